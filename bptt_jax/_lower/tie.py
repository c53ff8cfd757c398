"""Results that do not depend on every input, under vmap.

In the gradient of a batch of scans, JAX sums the cotangent of an input that the batch shares. A result that does not
depend on what is batched has one cotangent for all of the batch, which a `custom_vjp` sees as that of each member: its
part would be added once for each. So such a result is tied to all inputs, by a choice between it and
itself. vmap then gives it the batch axis that it would get anyway outside; XLA drops the choice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bptt_jax._lower.jaxprs import variables
from bptt_jax._lower.split import SplitStep
from bptt_jax._step import Arrays


def independent_outputs(parts: SplitStep) -> list[bool]:
    """For each leaf of the carry and y, whether the scan's result is independent of some input."""
    jaxpr = parts.jaxpr
    sources: dict[Any, frozenset[Any]] = {v: frozenset([v]) for v in jaxpr.invars}
    while True:
        for eqn in jaxpr.eqns:
            of = frozenset().union(*(sources.get(v, frozenset()) for v in variables(eqn.invars)))
            sources.update((v, of) for v in eqn.outvars)
        before = [sources[v] for v in parts.carry]
        outs = [sources.get(v, frozenset()) if variables([v]) else frozenset() for v in jaxpr.outvars]
        for v, of in zip(parts.carry, outs, strict=False):
            sources[v] |= of
        if [sources[v] for v in parts.carry] == before:
            carried = [sources[v] for v in parts.carry]
            return [of != set(jaxpr.invars) for of in [*carried, *outs[len(carried) :]]]


def tie(outs: Sequence[Any], independent: Sequence[bool], inputs: Arrays) -> list[Any]:
    """The results, those marked as independent made to depend on all inputs."""
    if not any(independent) or not inputs:
        return list(outs)
    marks = [jnp.any(leaf != leaf) for leaf in map(_data, inputs)]
    mark = functools.reduce(jnp.logical_or, marks)
    return [lax.select_n(mark, out, out) if tied else out for out, tied in zip(outs, independent, strict=True)]


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
