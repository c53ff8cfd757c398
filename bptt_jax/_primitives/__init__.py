"""The scan as JAX primitives: `scan`, and `forward`, `tangent` and `backward` for its differentiation."""
