"""What one can do with a plan alone: its schedule, and pictures of it. It needs no arrays and no device."""

from bptt_jax._notation import notation, parse
from bptt_jax._picture import plot, svg
from bptt_jax._plan import Plan, length
from bptt_jax._render import render
from bptt_jax._simulate import Advance, Backward, Event, Free, Record, Restore, Save, simulate

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
