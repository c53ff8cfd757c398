"""Steps to scan, as a table: each test that goes through it covers them all."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


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


def bare(params, carry, x):
    return jnp.tanh(carry @ params["w"] + x), None


def outputs(params, carry, x):
    """Leaves of x and y with axes of length 1."""
    carry = jnp.tanh(carry @ params["w"] + x["a"] * x["b"][None])
    return carry, {"y": jnp.sin(carry), "half": (carry[0], x["b"])}


def mixed(params, carry, x):
    """Float, integer, bool, PRNG key, a read-only float, and an empty leaf."""
    key, draw = jax.random.split(carry["key"])
    noise = jax.random.normal(draw, (2, 3), carry["h"].dtype)
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


def inner_scan(params, carry, x):
    """A loop within, with several outputs: one is read, one in part, and others are not."""

    def layer(v, w):
        v = jnp.tanh(v @ w)
        return v, (jnp.sin(v), jnp.exp(v), {"read": 2 * v, "unread": jnp.cos(v)})

    h, (seen, _, several) = lax.scan(layer, carry + x, params["layers"])
    return h, seen[-1] + several["read"].sum(0)


def inner_while(params, carry, x):
    """A loop within whose number of iterations the carry decides: it has no reverse mode."""
    h = jnp.tanh(carry @ params["w"] + x)
    return lax.while_loop(lambda v: jnp.sum(v**2) > 0.5, lambda v: 0.7 * v, h), h


def case_named(name: str, dtype: Any) -> Case:
    """The case of one of the steps above, for a float dtype."""

    def draw(seed: int, *shape: int) -> jax.Array:
        return normal(seed, *shape, dtype=dtype)

    w, b = 0.4 * draw(0, 3, 3), draw(1, 2, 3)
    if name == "bare":
        return Case(name, bare, {"w": w}, b, lambda n: draw(2, n, 2, 3))
    if name == "inner_scan":
        return Case(name, inner_scan, {"layers": 0.4 * draw(0, 2, 3, 3)}, b, lambda n: draw(2, n, 2, 3))
    if name == "inner_while":
        return Case(name, inner_while, {"w": w}, b, lambda n: draw(2, n, 2, 3))
    if name == "outputs":
        return Case(name, outputs, {"w": w}, b, lambda n: {"a": draw(3, n, 2, 3), "b": draw(4, n, 1)})
    if name == "no_inputs":
        return Case(name, no_inputs, {"w": w, "b": b}, (b, 0), lambda n: None)
    init = {
        "h": b,
        "count": jnp.array(0),
        "even": jnp.array(True),
        "key": jax.random.key(7),
        "memory": 0.3 * draw(5, 2, 3),
        "empty": jnp.zeros((0, 4), dtype),
    }
    return Case("mixed", mixed, {"w": w}, init, lambda n: (draw(6, n, 2, 3), jnp.arange(n) % 3))
