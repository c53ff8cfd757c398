"""Steps as the sweep would not choose to run them, to force in a test."""

from typing import Any

from bptt_jax import _pipeline
from bptt_jax._step.form import Swept, sweep_forms
from bptt_jax._step.merge import merge
from bptt_jax._step.split import split
from bptt_jax._step.style import Style
from bptt_jax._step.vjp import step_vjp


def force(monkeypatch: Any, style: Style) -> list[Swept]:
    """From now on each step that the sweep takes is run in a style.

    Returns:
      The forms that have been asked for so far.
    """
    made: dict[Any, Swept] = {}

    def fastest_form(step: Any, active: Any, machine: Any) -> Swept | None:
        if not sweep_forms(step, active, machine):
            return None
        key = (step, active, machine)
        if key not in made:
            closed = merge(step.inlined, step.n_operands, step.n_carry, machine) if style.merged else step.inlined
            made[key] = Swept(step_vjp(split(closed, step, active, machine, with_features=style.features)), style)
            found.append(made[key])
        return made[key]

    found: list[Swept] = []
    monkeypatch.setattr(_pipeline, "fastest_form", fastest_form)
    return found
