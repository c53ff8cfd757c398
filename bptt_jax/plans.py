"""What one can do with a plan without JAX: the schedule it yields, and pictures of it."""

from bptt_jax._plan import Plan, length
from bptt_jax._render import notation, render
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
    "render",
    "simulate",
]
