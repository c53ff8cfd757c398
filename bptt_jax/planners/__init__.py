"""Planners: pure functions from numbers to plans."""

from bptt_jax.planners import exact, paper
from bptt_jax.planners._make_plan import make_plan

__all__ = ["exact", "make_plan", "paper"]


def __dir__() -> list[str]:
    return __all__
