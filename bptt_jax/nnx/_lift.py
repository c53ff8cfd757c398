"""An NNX cell and its head as a pure step: their state goes in and out as in `flax.nnx.scan`.

`flax.nnx.scan` sorts the variables of a module into three kinds: shared by all steps, handed from one step to the next,
and separate for each step. Here they are sorted by the split and merge of Flax's own transformations, because these
preserve references between modules and put variables made by a step into the caller's own module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from bptt_jax._jaxprs.types import Tree
from bptt_jax._recurrent.heads import arguments_of

_TAG = "bptt_jax.nnx"

# For each filter of the axes the state it takes, or None where another part has it.
States = list[Any]


class Lifted:
    """A cell with a head, as a pure step (carry, carried, (x, head_input), given) -> (carry, carried, outputs, made).

    Attributes:
      carried: the state handed from one step to the next.
      given: the state separate for each step, stacked along `given_axes`.
    """

    def __init__(self, head: Any, axes: nnx.StateAxes, graphdef: Any, states: States):
        self._head = head
        self._axes = axes
        self._graphdef = graphdef
        self._states = states
        self.carried = self._part(states, lambda axis: axis is nnx.Carry)
        self.given = self._part(states, _is_int)
        self.given_axes = self.made_axes(self.given)
        self._shared = self._part(states, lambda axis: axis is None)

    def step(self, carry: Tree, carried: States, at: Any, given: States) -> tuple[Any, States, Any, States]:
        x, head_input = at
        with nnx.merge_context(_TAG, inner=True) as context:
            modules = context.merge(self._graphdef, *_whole(self._shared, carried, given))
        cell, head = (modules["cell"], modules["head"]) if isinstance(modules, dict) else (modules, self._head)
        carry, outputs = cell(carry, x)
        if head is not None:
            outputs = head(*arguments_of(outputs, head_input))
        with nnx.split_context(_TAG) as context:
            # Kept for `publish`, because a step may make variables.
            self._graphdef_after, *states = context.split(modules, *self._axes.filters)
        self._check_structure(type(cell), states)
        return carry, self._part(states, lambda axis: axis is nnx.Carry), outputs, self._part(states, _is_int)

    def publish(self, carried: States, made: States) -> None:
        """Writes the results of the scan into the modules."""
        states = _whole(self._shared, carried, made)
        with nnx.merge_context(_TAG, inner=False) as context:
            context.merge(self._graphdef_after, *states)

    def _part(self, states: States, wanted: Callable[[Any], bool]) -> States:
        return [state if wanted(axis) else None for state, axis in zip(states, self._axes.axes, strict=True)]

    def made_axes(self, states: States) -> list[Any]:
        """The axes along which states of steps are stacked; None where another part has the state."""
        return [None if state is None else axis for state, axis in zip(states, self._axes.axes, strict=True)]

    def _check_structure(self, cell_class: type, after: States) -> None:
        """Raises if a step adds variables to, or removes them from, state without an axis of steps."""
        for filter_, axis, old, new in zip(self._axes.filters, self._axes.axes, self._states, after, strict=True):
            before, behind = _paths(old), _paths(new)
            if not _is_int(axis) and before != behind:
                how = "shared by all steps (None)" if axis is None else "handed from step to step (nnx.Carry)"
                differing = ", ".join(sorted(before ^ behind))
                raise ValueError(
                    f"a step of {cell_class.__name__} added or removed {differing}, of the state that state_axes says "
                    f"is {how} for the filter {filter_!r}. State that steps make needs an axis, along which it is "
                    "stacked, such as state_axes={nnx.Intermediate: 0, ...: nnx.Carry}."
                )


def modules_of(cell: nnx.Module, head: Any) -> Any:
    """The modules of a layer: the cell or, with a module for a head, both by name, because they may share variables.

    A cell alone has the paths of `flax.nnx.scan`, which filters may ask for.
    """
    return {"cell": cell, "head": head} if isinstance(head, nnx.Module) else cell


@contextlib.contextmanager
def lifted_cell(cell: nnx.Module, head: Any, axes: nnx.StateAxes) -> Iterator[Lifted]:
    """The pure step of a cell and its head, to be run and published while the context lasts."""
    with nnx.update_context(_TAG):
        with nnx.split_context(_TAG) as context:
            graphdef, *states = context.split(modules_of(cell, head), *axes.filters)
        yield Lifted(head, axes, graphdef, states)


def _whole(*parts: States) -> States:
    """The states of all filters, each from the part that has it."""
    return [next(state for state in states if state is not None) for states in zip(*parts, strict=True)]


def _is_int(axis: Any) -> bool:
    return isinstance(axis, int)


def _paths(state: Any) -> set[str]:
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
