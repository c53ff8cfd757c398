"""Lowerings: each turns a plan and a step into a function for JAX to compile."""
