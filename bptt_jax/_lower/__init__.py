"""Lowerings: from a plan and a step to a function that JAX compiles."""
