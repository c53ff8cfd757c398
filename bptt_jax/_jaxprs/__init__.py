"""Equations and types of traced functions, read with public API of JAX only."""
