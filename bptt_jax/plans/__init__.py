"""Functions of a plan alone: length, notation, schedule, timeline and picture. They need no arrays and no device."""

from bptt_jax.plans._nodes import Plan, length
from bptt_jax.plans._notation import notation, parse
from bptt_jax.plans._picture import plot, svg
from bptt_jax.plans._schedule import Advance, Backward, Event, Free, Record, Restore, Save, simulate
from bptt_jax.plans._timeline import render

__all__ = [
    "Advance",
    "Backward",
    "Event",
    "Free",
    "Plan",
    "Record",
    "Restore",
    "Save",
    "length",
    "notation",
    "parse",
    "plot",
    "render",
    "simulate",
    "svg",
]


def __dir__() -> list[str]:
    return __all__
