"""Steps to scan, as a table: each test that goes through it covers them all."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Case:
    """A step with parameters to close over, a first carry, and inputs for any length.

    Attributes:
      step: (params, carry, x) -> (carry, y).
      params, init: float leaves of these are differentiated.
      xs: from a length to inputs, or to None.
    """

    name: str
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    params: Any
    init: Any
    xs: Callable[[int], Any]

    def __repr__(self) -> str:
        return self.name


def normal(seed: int, *shape: int, dtype: Any = None) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def make_cases(dtype: Any) -> list[Case]:
    """The table, for one float dtype."""
    w, b = 0.4 * normal(0, 3, 3, dtype=dtype), normal(1, 2, 3, dtype=dtype)

    def bare(params, carry, x):
        return jnp.tanh(carry @ params["w"] + x), None

    def outputs(params, carry, x):
        """Leaves of x and y with axes of length 1."""
        carry = jnp.tanh(carry @ params["w"] + x["a"] * x["b"][None])
        return carry, {"y": jnp.sin(carry), "half": (carry[0], x["b"])}

    def mixed(params, carry, x):
        """Float, integer, bool, PRNG key, a read-only float, and an empty leaf."""
        key, draw = jax.random.split(carry["key"])
        noise = jax.random.normal(draw, (2, 3), dtype)
        h = jnp.tanh(carry["h"] @ params["w"] + carry["memory"] + x[0] + 0.1 * noise)
        h = jnp.where(carry["even"] & (x[1] > 0), h, -h)
        new = {
            "h": h,
            "count": carry["count"] + x[1],
            "even": ~carry["even"],
            "key": key,
            "memory": carry["memory"],
            "empty": carry["empty"],
        }
        return new, (h * 2, carry["count"])

    def no_inputs(params, carry, x):
        assert x is None
        a, n = carry
        return (jnp.sin(a @ params["w"]) + params["b"], n + 1), a[:, 0]

    mixed_init = {
        "h": b,
        "count": jnp.array(0),
        "even": jnp.array(True),
        "key": jax.random.key(7),
        "memory": 0.3 * normal(5, 2, 3, dtype=dtype),
        "empty": jnp.zeros((0, 4), dtype),
    }
    return [
        Case("bare", bare, {"w": w}, b, lambda n: normal(2, n, 2, 3, dtype=dtype)),
        Case(
            "outputs",
            outputs,
            {"w": w},
            b,
            lambda n: {"a": normal(3, n, 2, 3, dtype=dtype), "b": normal(4, n, 1, dtype=dtype)},
        ),
        Case("mixed", mixed, {"w": w}, mixed_init, lambda n: (normal(6, n, 2, 3, dtype=dtype), jnp.arange(n) % 3)),
        Case("no_inputs", no_inputs, {"w": w, "b": b}, (b, 0), lambda n: None),
    ]
