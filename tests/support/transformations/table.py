"""The table: a row is a program around a scan. The modules beside this one fill it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.support import comparison
from tests.support.adversarial import TABLE as ADVERSARIES
from tests.support.comparison import Scan, is_float, real_sum
from tests.support.steps import Case, case_named

LENGTH = 12


@dataclasses.dataclass(frozen=True)
class Model:
    """A step, scanned by `jax.lax.scan` or in its place, as functions of all that is differentiated."""

    scan: Scan
    case: Case

    def results(self, floats: list[Any]) -> Any:
        return self._loss(floats)[1]

    def loss(self, floats: list[Any]) -> Any:
        return self._loss(floats)[0]

    def _loss(self, floats: list[Any]) -> tuple[Any, Any]:
        return comparison.make_loss(self.case, LENGTH, self.scan)[0](floats)

    def loss_of_first(self, floats: list[Any]) -> Callable[[Any], Any]:
        """The loss as a function of the first of them, a weight, where results are large in the size of inputs."""
        return lambda first: self.loss([first, *floats[1:]])


@dataclasses.dataclass(frozen=True)
class Row:
    """A program.

    Attributes:
      run: from a model and what is differentiated to results to compare.
      situation: when somebody writes it.
      steps: names of those that it makes sense for.
      jitted: whether it runs in a jit around all of it.
    """

    run: Callable[[Model, list[Any]], Any]
    situation: str
    steps: tuple[str, ...]
    jitted: bool

    def __repr__(self) -> str:
        return self.run.__name__


# Steps of tests/support/steps.py, and of the adversaries those with: an integer in the carry, a weight used three
# times, a branch, and a derivative rule that is wrong on purpose.
ADVERSARIAL = {
    "count": "chosen_by_a_count_in_the_carry",
    "tied": "used_three_times",
    "cond": "cond_on_the_carry",
    "own_rule": "own_gradient_of_a_product",
}
EVERY = ("count", "tied", "mixed", "cond", "inner_scan", "no_inputs")
REVERSE = (*EVERY, "own_rule")
FORWARD = (*EVERY, "inner_while")
ROWS: list[Row] = []


def row(steps: tuple[str, ...] = REVERSE, *, jitted: bool = True) -> Callable[[Any], Any]:
    """Enters a program in the table; its docstring is the situation."""

    def enter(run: Any) -> Any:
        ROWS.append(Row(run, run.__doc__, steps, jitted))
        return run

    return enter


def step_named(name: str) -> Case:
    return ADVERSARIES[ADVERSARIAL[name]].case() if name in ADVERSARIAL else case_named(name, jnp.float64)


def batch(floats: list[Any], axis: int = 0, is_batched: Callable[[int], bool] = lambda i: True) -> tuple[Any, Any]:
    """Three examples of inputs, and their axes: `axis` or the last that a leaf can have; None for what they share."""
    axes = [min(axis, leaf.ndim) if is_batched(i) else None for i, leaf in enumerate(floats)]
    examples = [
        leaf if axis is None else jnp.stack([leaf, 0.5 * leaf, -leaf], axis)
        for leaf, axis in zip(floats, axes, strict=True)
    ]
    return examples, axes


def scaled(floats: list[Any], scale: Any) -> list[Any]:
    return [leaf * scale for leaf in floats]


def weighed(results: Any) -> Any:
    """A sum of results in which each entry has a weight of its own, so that no two can be exchanged unnoticed."""
    leaves = [leaf for leaf in jax.tree.leaves(results) if is_float(leaf)]
    return sum(real_sum(jnp.sin(leaf) * comparison.distinct_weights(leaf)) for leaf in leaves)


def directions(floats: list[Any]) -> list[Any]:
    return [jnp.cos(leaf) for leaf in lax.stop_gradient(floats)]


def along(gradient: list[Any]) -> Any:
    """A scalar of a gradient, to differentiate."""
    return sum(jnp.vdot(leaf, jnp.cos(leaf)) for leaf in gradient)
