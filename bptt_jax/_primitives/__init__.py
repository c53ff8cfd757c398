"""The scan as JAX primitives: `scan`, and what its differentiation is made of, `forward`, `tangent` and `backward`."""
