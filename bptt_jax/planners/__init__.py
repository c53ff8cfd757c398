"""Planners: pure functions from numbers to plans."""

from bptt_jax.planners.equal import make_plan

__all__ = ["make_plan"]
