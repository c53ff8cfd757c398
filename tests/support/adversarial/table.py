"""The table of adversarial cases, which the modules beside this one fill.

A case here is a step and functions that make its inputs: arrays are made inside the tests, whose fixtures switch double
precision on, and are drawn by NumPy, for which there is nothing to compile.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.steps import Case


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A step that a lowering may get wrong, with what to compare it on.

    Attributes:
      tolerance: relative to the largest entry of a leaf; ten times that for second derivatives.
      conservative: whether the gradient is one: custom rules and stopped gradients make something else of it, whose
        Jacobian is not symmetric.
    """

    name: str
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    params: Callable[[], Any]
    init: Callable[[], Any]
    xs: Callable[[int], Any]
    tolerance: float
    conservative: bool

    def __repr__(self) -> str:
        return self.name

    def case(self) -> Case:
        return Case(self.name, self.step, self.params(), self.init(), self.xs)


TABLE: dict[str, Adversary] = {}


def draw(seed: int, *shape: int, dtype: Any = jnp.float64, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def integers(seed: int, below: int, *shape: int, dtype: Any = jnp.int32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, below, size=shape), dtype)


def keys(seed: int, *shape: int, impl: str = "threefry2x32") -> jax.Array:
    words = {"threefry2x32": 2, "rbg": 4}[impl]
    bits = np.random.default_rng(seed).integers(0, 2**32, size=(*shape, words), dtype=np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(bits), impl=impl)


def weight() -> jax.Array:
    return draw(0, 3, 3, scale=0.5)


def batch() -> jax.Array:
    return draw(1, 2, 3)


def inputs(length: int) -> jax.Array:
    return draw(2, length, 2, 3)


def adversary(
    params: Callable[[], Any] = weight,
    init: Callable[[], Any] = batch,
    xs: Callable[[int], Any] = inputs,
    *,
    name: str | None = None,
    tolerance: float = 1e-10,
    conservative: bool = True,
) -> Callable[[Any], Any]:
    """Enters a step in the table, by default with one square weight, a batch of vectors as carry, and as many xs."""

    def enter(step: Any) -> Any:
        entry = Adversary(name or step.__name__, step, params, init, xs, tolerance, conservative)
        if entry.name in TABLE:
            raise ValueError(f"two adversaries are named {entry.name}")
        TABLE[entry.name] = entry
        return step

    return enter
