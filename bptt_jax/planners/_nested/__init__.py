"""The planner of nests of `jax.checkpoint`: chains of loops, of at most 8 copies of the step."""
