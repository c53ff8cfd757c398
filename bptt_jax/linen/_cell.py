"""A bound cell and its head as one pure step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from bptt_jax._jaxprs.types import Tree
from bptt_jax._recurrent.heads import arguments_of, refuse_hidden_modules
from bptt_jax._recurrent.recurrence import Step
from bptt_jax.linen._lift import Lift, Lifted, lift


@dataclasses.dataclass(frozen=True)
class LiftedCell:
    """A cell with a head, as a pure step (carry, carried, (x, head_input), given) -> (carry, carried, outputs, made).

    Attributes:
      step, carried, given, given_axes, made_axes: as in `recurrence.PureCell`, pairs of the cell's and the head's.
      publish: writes the last `carried` and the stacked `made` into the scopes of both.
    """

    step: Step
    carried: Any
    given: Any
    given_axes: Any
    made_axes: Callable[[Any], Any]
    publish: Callable[[Any, Any], None]


def lift_cell(cell: nn.Module, head: Any, options: Lift, carry: Tree, first: Any, length: int) -> LiftedCell:
    """The step of a bound cell and its head.

    Args:
      cell: a bound cell.
      head: a bound module, a function, or None: the outputs are the cell's then.
      options: how collections and keys of both are treated.
      carry, first: arguments of the first step; `first` is (x, head_input).
      length: the number of steps.
    """
    x, head_input = first
    of_cell = lift("the cell", cell, options, (carry, x), length)
    _, y = of_cell.first
    if isinstance(head, nn.Module):
        of_head = lift("the head", head, options, arguments_of(y, head_input), length)
    else:
        refuse_hidden_modules(head, _is_bound)
        of_head = _without_variables((lambda y: y) if head is None else head)
    both = of_cell, of_head

    def step(carry: Tree, carried: Tree, at: Any, given: Any) -> Any:
        x, head_input = at
        (carry, y), *of_first = of_cell.run(carried[0], given[0], carry, x)
        outputs, *of_second = of_head.run(carried[1], given[1], *arguments_of(y, head_input))
        carried, made = zip(of_first, of_second, strict=True)
        return carry, carried, outputs, made

    def publish(carried: Tree, made: Any) -> None:
        for part, own_carried, own_made in zip(both, carried, made, strict=True):
            part.publish(own_carried, own_made)

    return LiftedCell(
        step,
        tuple(part.carried for part in both),
        tuple(part.given for part in both),
        tuple(part.given_axes for part in both),
        lambda made: tuple(part.made_axes(own) for part, own in zip(both, made, strict=True)),
        publish,
    )


def _is_bound(value: Any) -> bool:
    return isinstance(value, nn.Module) and value.scope is not None


def _without_variables(function: Callable[..., Any]) -> Lifted:
    """A plain function, lifted as a module without variables and keys."""

    def run(carried: Tree, given: Any, *inputs: Tree) -> Any:
        return function(*inputs), carried, {}

    return Lifted(run, None, {}, ({}, {}), (0, {}), lambda made: {}, lambda carried, made: None)
