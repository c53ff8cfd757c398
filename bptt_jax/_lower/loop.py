"""The loops over the steps of a block: how many steps an iteration has, and features read a step ahead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from bptt_jax._caches import remember
from bptt_jax._device.machine import Machine
from bptt_jax._jaxprs.arrays import counted
from bptt_jax._jaxprs.equations import inner_jaxprs, variables
from bptt_jax._jaxprs.types import Index, Jaxpr, Tree
from bptt_jax._lower.late import late_zero, late_zeros
from bptt_jax._trace.call import Arrays, FlatStep, ScanCall
from bptt_jax.plans._blocks import steps_together

Body = Callable[[Any, Any], tuple[Any, Any]]


def run_loop(call: ScanCall, body: Body, init: Tree, xs: Tree, n: int, backwards: bool = False) -> Any:
    """`jax.lax.scan` over n steps, in the order of the call, or against it."""
    # Two reversals cancel: the backward of a reversed scan goes through xs from the start.
    return lax.scan(body, init, xs, n, reverse=call.reverse != backwards, unroll=unroll_of(call, n))


def run_stacking_late(call: ScanCall, body: Body, quiet: Body, init: Tree, xs: Tree, n: int, after: Arrays) -> Any:
    """`run_loop` against the order of the call, where room for the stacked results is made after some values exist.

    The room of `jax.lax.scan` is made of plain zeros, so XLA makes it as early as it likes: on CPU before the loop that
    makes xs, with arrays of that loop in memory.

    Args:
      call: the scan.
      body, init, xs, n: as for `run_loop`.
      quiet: the body without callbacks, evaluated once for the types of its results.
      after: the values.
    """
    zero = late_zero([leaf[:1] for leaf in after])
    _, outs = quiet(init, jax.tree.map(lambda leaf: leaf[0], xs))
    room = [late_zeros(lax.broadcast(out, (n,)), zero) for out in outs]

    def writing(state: Tree, at: Tree) -> tuple[Any, None]:
        (state, room), (x, i) = state, at
        state, outs = body(state, x)
        put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
        return (state, [put(array, out) for array, out in zip(room, outs, strict=True)]), None

    over = xs, jnp.arange(n, dtype=jnp.int32)
    (state, stacks), _ = run_loop(call, writing, (init, room), over, n, backwards=True)
    return state, stacks


def run_reading_ahead(call: ScanCall, body: Body, init: Tree, xs: Tree, ahead: Arrays, n: int) -> Any:
    """`run_loop` of a body for pairs (x, a), where the a are read from `ahead` at the end of the step before.

    XLA makes no vector code on CPU of a function fused with a read at an index. Handed on by the carry, a value comes
    from a kernel of its own.
    """
    first, onwards = (n - 1, -1) if call.reverse else (0, 1)

    def read(i: Index) -> list[Any]:
        return [lax.dynamic_index_in_dim(array, i, keepdims=False) for array in ahead]

    def reading(state: Tree, at: Tree) -> tuple[Any, Any]:
        (state, given), (x, i) = state, at
        state, outs = body(state, (x, given))
        return (state, read(i + onwards)), outs  # after the last step any value will do, so the index may be outside

    over = xs, jnp.arange(n, dtype=jnp.int32)
    (state, _), outs = run_loop(call, reading, (init, read(first)), over, n)
    return state, outs


def unroll_of(call: ScanCall, n: int) -> int:
    """The steps in an iteration of a loop over n steps: as the user says, else by sizes."""
    if call.unroll is not None:
        return max(min(call.unroll, n), 1)
    return steps_together(n, most_together(call))


def most_together(call: ScanCall) -> int:
    """The most steps in an iteration of the innermost loops."""
    return call.unroll or _most_together(call.step, call.options.machine)


@remember(1024)
def _most_together(step: FlatStep, machine: Machine) -> int:
    return 1 if machine.is_cpu else machine.steps_together(moved_bytes(step, machine), _count(step.body.jaxpr))


def moved_bytes(step: FlatStep, machine: Machine) -> int:
    """Bytes read from the inputs of a step and written by its equations; those of an inner scan for each iteration."""
    return _moved_bytes(step.body.jaxpr, machine)


def _moved_bytes(jaxpr: Jaxpr, machine: Machine) -> int:
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive is primitives.scan_p]
    made = sum(machine.bytes_of(eqn.outvars) for eqn in jaxpr.eqns)
    inner = [
        counted((eqn.params["length"],))[0] * _moved_bytes(one, machine) for eqn in scans for one in inner_jaxprs(eqn)
    ]
    return machine.bytes_of(variables(jaxpr.invars)) + made + sum(inner)


def _count(jaxpr: Jaxpr) -> int:
    """The equations of a jaxpr, at any depth."""
    return len(jaxpr.eqns) + sum(_count(one) for eqn in jaxpr.eqns for one in inner_jaxprs(eqn))
