"""The nested lowering: `jax.checkpoint` around `jax.lax.scan`, nested as the plan's tree is.

    Steps(n)      lax.scan over n steps
    Repeat(k, c)  lax.scan over k slices of xs, each run through c
    Chain(cs)     one child after another, each on its part of xs
    Remat(c)      jax.checkpoint(c)

Nothing but these two is used, so every JAX transformation works on the result. The body of every scan is the same
traced step: the program has one copy of it per `Steps` leaf, and its size does not depend on any length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from bptt_jax._lower.by_index import ByIndex, steps_of
from bptt_jax._lower.counting import Counting, Run
from bptt_jax._lower.differentiated import Differentiated
from bptt_jax._lower.host import to_device, to_host
from bptt_jax._lower.loop import unroll_of
from bptt_jax._trace.active import Active
from bptt_jax._trace.call import Arrays, FlatStep, Mask, ScanCall, select
from bptt_jax.plans._nodes import Chain, Plan, Remat, Repeat, Steps, length, runs_single_steps

Axes = tuple[int, ...]
Unroll = Callable[[int], int]


class Nested:
    """A plan run by the nest.

    Args:
      call: the scan.
      wrt: the inputs to differentiate.
      plan: the plan.
      active: the leaves that a derivative goes through.
      is_mapped: whether it runs under vmaps.
    """

    def __init__(self, call: ScanCall, wrt: Mask, plan: Plan, active: Active, is_mapped: bool = False):
        self._call = call
        self._wrt = wrt
        self._plan = plan
        self._active = (*active.carry, *active.y)
        self._progress, self._back = call.reporting("forward"), call.reporting("backward")
        self._counting = Counting(self._progress, self._back, active) if call.options.progress else None
        # One loop over all steps keeps each x it reads: as many bytes as the copy it would slice.
        is_one_loop = isinstance(plan, Steps)
        self._by_index = (False,) * len(call.x_along) if is_one_loop else read_by_index(call, wrt, is_mapped)
        self._by_types: dict[Any, Differentiated] = {}

    def evaluate(self, inputs: Arrays) -> list[Any]:
        """The last carry and ys."""
        call = self._call
        operands, carry, _ = call.step.split(inputs)
        step, xs = steps_of(call, inputs, self._by_index)
        unroll = functools.partial(unroll_of, call)
        run = lower(self._plan, step, reverse=call.reverse, unroll=unroll, counting=self._counting)
        last, ys = run(operands, carry, xs)
        lengths = call.lengths_of(inputs)
        return [*last, *(along.back(leaf, lengths) for leaf, along in zip(ys, call.y_along, strict=True))]

    def forward(self, inputs: Arrays) -> tuple[list[Any], list[Any]]:
        """(last carry and ys, the arrays kept for `backward`)."""
        outs = core.jaxpr_as_fun(self._differentiated(inputs).forward)(*inputs)
        n = len(self._active)
        self._progress.end(outs[:n])
        return outs[:n], outs[n:]

    def kept(self, inputs: Arrays) -> list[Any]:
        """The second result of `forward`, evaluated again, without callbacks."""
        return list(core.jaxpr_as_fun(self._differentiated(inputs).kept)(*inputs))

    def backward(self, inputs: Arrays, saved: Arrays, cotangents: Arrays) -> list[Any]:
        """The gradients of the differentiated inputs; see `Sweep.backward`."""
        given = tuple(ct is not None for ct in cotangents)
        pull = self._differentiated(inputs).pull(given)
        found = list(core.jaxpr_as_fun(pull)(*inputs, *saved, *select(cotangents, given)))
        self._back.end(found)
        return found

    def _differentiated(self, inputs: Arrays) -> Differentiated:
        """The same object for inputs of the same types, under any vmap: `backward` must know the arrays kept before."""
        types = tuple(map(jax.typeof, inputs))
        if types not in self._by_types:
            active = [i for i, is_active in enumerate(self._active) if is_active]
            shown = self._call.options.show_recomputation
            made = Differentiated(self.evaluate, types, self._wrt, active, shown, self._progress)
            self._by_types[types] = made
        return self._by_types[types]


def read_by_index(call: ScanCall, wrt: Mask, is_mapped: bool) -> Mask:
    """The leaves of xs to read where they are: a loop would slice copies of them, and none is differentiated."""
    of_xs = call.step.split(wrt)[2]
    return tuple(not w and (is_mapped or not a.is_leading) for w, a in zip(of_xs, call.x_along, strict=True))


def lower(
    plan: Plan,
    step: FlatStep | ByIndex,
    *,
    reverse: bool = False,
    unroll: Unroll = lambda n: 1,
    counting: Counting | None = None,
) -> Run:
    """A function (operands, carry, xs) -> (carry, ys), running `plan`.

    Args:
      plan: of as many steps as xs has.
      step: the body.
      reverse: whether the steps go through xs and ys from the end, as in `jax.lax.scan`.
      unroll: n -> steps per iteration of the loop of a `Steps(n)`.
      counting: for reports of progress; None for none.
    """
    lowered = functools.partial(_lower, reverse=reverse, unroll=unroll, counting=counting)
    if runs_single_steps(plan):  # its arrays have no axis of several steps: XLA takes xs and ys as they are
        return lowered(plan, step) if counting is None else counting.counted(lowered(plan, step))
    xs_units, ys_units = _unit_axes(step.x), _unit_axes(step.y)
    run = lowered(plan, _squeezed(step, xs_units, ys_units))
    run = run if counting is None else counting.counted(run)

    def unsqueezed(operands: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        carry, ys = run(operands, carry, _without(xs, xs_units, of_time=1))
        return carry, _with(ys, ys_units, of_time=1)

    return unsqueezed


def with_unit_axes(step: FlatStep) -> list[Any]:
    """The types of leaves of x and y with axes of length 1: XLA copies all cotangents of such xs, and all of such ys.

    XLA gives arrays with such axes another layout. The loops of a nest run without them, because in loops xs and the
    cotangents of ys were copied as well. Where results leave the nest, the copy cannot be avoided (CPU, JAX 0.10).
    """
    leaves = [*step.x, *step.y]
    return [leaf for leaf, units in zip(leaves, _unit_axes(leaves), strict=True) if units]


def _unit_axes(leaves: Arrays) -> list[Axes]:
    """For each leaf the axes of length 1, without those divided over a mesh."""
    return [
        tuple(i for i, size in enumerate(leaf.shape) if size == 1 and leaf.sharding.spec[i] is None) for leaf in leaves
    ]


def _without(leaves: Arrays, axes: Sequence[Axes], of_time: int = 0) -> Arrays:
    return [lax.squeeze(leaf, [i + of_time for i in units]) for leaf, units in zip(leaves, axes, strict=True)]


def _with(leaves: Arrays, axes: Sequence[Axes], of_time: int = 0) -> Arrays:
    return [lax.expand_dims(leaf, [i + of_time for i in units]) for leaf, units in zip(leaves, axes, strict=True)]


def _squeezed(step: Run, xs_units: Sequence[Axes], ys_units: Sequence[Axes]) -> Run:
    def run(operands: Arrays, carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
        carry, y = step(operands, carry, _with(x, xs_units))
        return carry, _without(y, ys_units)

    return run


def _lower(
    plan: Plan, step: Run, reverse: bool, unroll: Unroll, counting: Counting | None, in_loop: bool = False
) -> Run:
    inside = in_loop or isinstance(plan, Repeat)
    lower_child = functools.partial(
        _lower, step=step, reverse=reverse, unroll=unroll, counting=counting, in_loop=inside
    )
    match plan:
        case Steps(n):
            loop = functools.partial(_steps, reverse=reverse, unroll=unroll)
            return loop(n, step) if counting is None else counting.leaf(n, step, loop, in_loop)
        case Remat(child):
            return jax.checkpoint(lower_child(child))
        case Repeat(k, Remat(child), kept="host") if k >= 2:
            on_host = jax.checkpoint(_from_host(_slice_runner(length(child), lower_child(child))), prevent_cse=False)
            return _repeat(k, length(child), _to_host(on_host), reverse)
        case Repeat(k, Remat(child)) if k >= 2:
            # XLA does not merge recomputation with the first pass across a loop of two or more iterations. So the
            # barriers of `prevent_cse` are not needed, and they cost time in every iteration.
            body = jax.checkpoint(_slice_runner(length(child), lower_child(child)), prevent_cse=False)
            return _repeat(k, length(child), body, reverse)
        case Repeat(k, child):
            return _repeat(k, length(child), _slice_runner(length(child), lower_child(child)), reverse)
        case Chain(children):
            made: dict[Plan, Run] = {}  # JAX traces each function anew, so equal children share one
            for child in children:
                if child not in made:
                    made[child] = lower_child(child)
            return _chain([(length(child), made[child]) for child in children], reverse)
    raise TypeError(f"not a plan node: {plan!r}")


def _steps(n: int, step: Run, reverse: bool, unroll: Unroll) -> Run:
    def run(operands: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        def body(carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
            return step(operands, carry, x)

        if n == 1:
            carry, y = step(operands, carry, [leaf[0] for leaf in xs])
            return carry, [leaf[None] for leaf in y]
        start: Arrays = list(carry)
        return lax.scan(body, start, list(xs), length=n, reverse=reverse, unroll=unroll(n))

    return run


def _repeat(k: int, n: int, child: Run, reverse: bool) -> Run:
    def run(operands: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        def body(carry: Arrays, part: Arrays) -> tuple[Arrays, Arrays]:
            return child(operands, carry, part)

        parts = list(xs) if n == 1 else [leaf.reshape(k, n, *leaf.shape[1:]) for leaf in xs]
        start: Arrays = list(carry)
        carry, ys = lax.scan(body, start, parts, length=k, reverse=reverse)
        return carry, ys if n == 1 else [leaf.reshape(k * n, *leaf.shape[2:]) for leaf in ys]

    return run


def _to_host(child: Run) -> Run:
    """`child`, with its first carry handed to it on the host: a checkpoint keeps its arguments where they are."""

    def run(operands: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        return child(operands, list(map(to_host, carry)), xs)

    return run


def _from_host(child: Run) -> Run:
    """`child` of a first carry on the host."""

    def run(operands: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        return child(operands, list(map(to_device, carry)), xs)

    return run


def _slice_runner(n: int, child: Run) -> Run:
    """`child` of n steps as the body of a loop.

    A single step is sliced out of xs without its time axis. With this axis of length 1, XLA would give the whole array
    another layout, and copy it (xs and the cotangents of ys; CPU, JAX 0.10 and 0.12).
    """
    if n != 1:
        return child

    def run(operands: Arrays, carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
        carry, ys = child(operands, carry, [leaf[None] for leaf in x])
        return carry, [leaf[0] for leaf in ys]

    return run


def _chain(children: Sequence[tuple[int, Run]], reverse: bool) -> Run:
    def run(operands: Arrays, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        start = 0
        end = sum(n for n, _ in children)
        outputs = []
        for n, child in children:
            # In reverse, the first child takes the last steps of xs.
            at = end - start - n if reverse else start
            carry, ys = child(operands, carry, [lax.slice_in_dim(leaf, at, at + n) for leaf in xs])
            outputs.append(ys)
            start += n
        if reverse:
            outputs.reverse()
        return carry, [lax.concatenate(parts, 0) for parts in zip(*outputs, strict=True)]

    return run
