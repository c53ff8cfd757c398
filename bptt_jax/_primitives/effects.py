"""Scans of steps with effects, in JAX's own equations, because JAX lets only these have them.

Effects on references, and callbacks with results. Steps with callbacks for debugging are ordinary ones.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from bptt_jax._jaxprs.arrays import is_float
from bptt_jax._jaxprs.equations import is_debug, is_named_axis, is_reference
from bptt_jax._jaxprs.types import Leaf
from bptt_jax._lower import plain
from bptt_jax._trace.call import Arrays, ScanCall


def run_now(call: ScanCall, inputs: Arrays) -> list[Any]:
    """The results of a call, as `jax.lax.scan` computes them.

    With a plan or a budget it has no derivatives, because a step that runs again would have its effects again.
    """
    if call.options.plan is not None or call.options.budget is not None:
        names = {
            "references" if is_reference(effect) else str(effect)
            for effect in call.step.jaxpr.effects
            if not (is_debug(effect) or is_named_axis(effect))
        }
        effects = ", ".join(sorted(names))
        inputs = [_without_derivative(leaf, effects) if _has_tangents(leaf) else leaf for leaf in inputs]
    return plain.run(call, inputs)


def _has_tangents(leaf: Leaf) -> bool:
    return isinstance(jax.typeof(leaf), jax.core.ShapedArray) and is_float(leaf)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _without_derivative(leaf: Leaf, effects: str) -> Any:
    """An input of a scan that must not be differentiated."""
    return leaf


@_without_derivative.defjvp
def _refuse(effects: str, _primals: Any, _tangents: Any) -> Any:
    raise NotImplementedError(
        f"the step has effects ({effects}), which a backward pass within a budget or a plan would have again for each "
        "step that it evaluates again. Leave out budget= and plan=, or return the values as outputs of the step; "
        "callbacks of jax.debug and jax.pure_callback work with both."
    )
