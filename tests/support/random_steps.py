"""Steps drawn at random: parts of what people write into a step, put together in ways that nobody would think of.

What a step closes over, hands on and gives out is drawn too: leaves of integers, keys, no elements, axes of length 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.support.steps import Case

Draw = np.random.Generator
Part = Callable[[Any, Any, Any, Any], Any]  # of (weights, state, x, carry): the new state
Made = tuple[dict[str, Any], Part]  # a part with its weights


def normal(draw: Draw, *shape: int, dtype: Any, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * draw.normal(size=shape), dtype)


def matrix(draw: Draw, rows: int, columns: int, dtype: Any) -> jax.Array:
    return normal(draw, rows, columns, dtype=dtype, scale=0.7 / rows**0.5)


def product(draw: Draw, width: int, dtype: Any) -> Made:
    return {"w": matrix(draw, width, width, dtype)}, lambda p, h, x, carry: jnp.tanh(h @ p["w"] + x)


def both_ways(draw: Draw, width: int, dtype: Any) -> Made:
    """A weight and its transpose."""
    return {"w": matrix(draw, width, width, dtype)}, lambda p, h, x, carry: jnp.tanh(h @ p["w"] + x @ p["w"].T)


def wider_inside(draw: Draw, width: int, dtype: Any) -> Made:
    weights = {"a": matrix(draw, width, 4 * width, dtype), "b": matrix(draw, 4 * width, width, dtype)}
    return weights, lambda p, h, x, carry: h + jax.nn.gelu((h + x) @ p["a"]) @ p["b"]


def gated(draw: Draw, width: int, dtype: Any) -> Made:
    weights = {"v": matrix(draw, width, width, dtype), "b": normal(draw, 1, width, dtype=dtype)}

    def apply(p: Any, h: Any, x: Any, carry: Any) -> Any:
        gate = jax.nn.sigmoid(x @ p["v"] + p["b"] * h)
        return gate * h + (1 - gate) * x

    return weights, apply


def linear(draw: Draw, width: int, dtype: Any) -> Made:
    return {}, lambda p, h, x, carry: jnp.asarray(0.9, h.dtype) * h + x


def stencil(draw: Draw, width: int, dtype: Any) -> Made:
    return {}, lambda p, h, x, carry: h + 0.1 * (jnp.roll(h, 1, -1) - 2 * h + jnp.roll(h, -1, -1)) + jnp.sin(x)


def inner_scan(draw: Draw, width: int, dtype: Any) -> Made:
    def apply(p: Any, h: Any, x: Any, carry: Any) -> Any:
        return lax.scan(lambda v, w: (jnp.tanh(v @ w + x), None), h, p["stack"])[0]

    return {"stack": jnp.stack([matrix(draw, width, width, dtype) for _ in range(3)])}, apply


def branch(draw: Draw, width: int, dtype: Any) -> Made:
    def apply(p: Any, h: Any, x: Any, carry: Any) -> Any:
        return lax.cond(carry["count"] % 2 == 0, lambda v: jnp.tanh(v @ p["w"]), jnp.sin, h + x)

    return {"w": matrix(draw, width, width, dtype)}, apply


def table(draw: Draw, width: int, dtype: Any) -> Made:
    """Read by an integer of the carry."""
    rows = normal(draw, 50, width, dtype=dtype)
    return {"rows": rows}, lambda p, h, x, carry: jnp.tanh(h + p["rows"][carry["count"] % 50] + x)


def made_matrix(draw: Draw, width: int, dtype: Any) -> Made:
    """Weights without a gradient."""

    def apply(p: Any, h: Any, x: Any, carry: Any) -> Any:
        return jnp.tanh(h @ (0.5 * jnp.eye(width, dtype=h.dtype)) + x @ lax.stop_gradient(p["w"]))

    return {"w": matrix(draw, width, width, dtype)}, apply


def dropped_out(draw: Draw, width: int, dtype: Any) -> Made:
    def apply(p: Any, h: Any, x: Any, carry: Any) -> Any:
        return jnp.where(jax.random.bernoulli(carry["key"], 0.9, h.shape), h, 0.1 * x)

    return {}, apply


def in_16_bits(draw: Draw, width: int, dtype: Any) -> Made:
    def apply(p: Any, h: Any, x: Any, carry: Any) -> Any:
        low = (h + x).astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
        return h + jnp.tanh(low.astype(h.dtype))

    return {"w": matrix(draw, width, width, dtype)}, apply


@jax.custom_vjp
def bent(v: jax.Array) -> jax.Array:
    return jnp.sin(v)


# Twice what it should be, so that one sees whether it is used.
bent.defvjp(lambda v: (jnp.sin(v), (v, jnp.cos(v))), lambda kept, ct: (2 * ct * kept[1] + 0 * kept[0],))


def own_rule(draw: Draw, width: int, dtype: Any) -> Made:
    return {}, lambda p, h, x, carry: bent(h + x)


PARTS = (product, both_ways, wider_inside, gated, linear, stencil, inner_scan, branch, table, made_matrix, dropped_out,
         in_16_bits, own_rule)  # fmt: skip
OUTPUTS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "none": lambda p, h, x, carry: None,
    "state": lambda p, h, x, carry: h,
    "readout": lambda p, h, x, carry: h @ p["out"],
    "of x": lambda p, h, x, carry: (x**2, h),
    "small": lambda p, h, x, carry: {"mean": h.mean(-1), "count": carry["count"]},
}


def random_step(seed: int, dtype: Any = jnp.float32) -> Case:
    """The step of a seed, named after its parts; floats are of `dtype`, and of 16 bits inside only if it has 32."""
    draw = np.random.default_rng(seed)
    batch, width = int(draw.choice([1, 2, 8, 32])), int(draw.choice([1, 3, 16, 33, 64, 128]))
    parts = [part for part in PARTS if part is not in_16_bits or dtype != jnp.float64]
    drawn = [parts[i] for i in draw.integers(len(parts), size=draw.integers(1, 4))]
    made = [part(draw, width, dtype) for part in drawn]
    output = str(draw.choice(list(OUTPUTS)))
    out = matrix(draw, width, int(draw.choice([1, 10, 4 * width])), dtype)
    is_moving, has_inputs = bool(draw.integers(2)), draw.random() < 0.9

    def step(params: Any, carry: Any, x: Any) -> Any:
        h = carry["h"]
        for p, (_, part) in zip(params["parts"], made, strict=True):
            h = part(p, h, jnp.zeros_like(h) if x is None else x, carry)
        memory = 0.5 * carry["memory"] + h if is_moving else carry["memory"]
        key = jax.random.fold_in(carry["key"], 1)
        after = {"h": h + 0.1 * carry["memory"], "memory": memory, "key": key, "count": carry["count"] + 1}
        after["empty"] = carry["empty"]
        return after, OUTPUTS[output](params, h, jnp.zeros_like(h) if x is None else x, carry)

    state = normal(draw, batch, width, dtype=dtype)
    init = {"h": state, "memory": 0.1 * state, "key": jax.random.key(seed), "count": jnp.int32(0)}
    init["empty"] = jnp.zeros((0, 3), dtype)
    params = {"parts": [weights for weights, _ in made], "out": out}
    key, name = jax.random.key(seed + 1), ", ".join(part.__name__ for part in drawn)

    def xs(n: int) -> Any:
        return 0.5 * jax.random.normal(key, (n, batch, width), dtype) if has_inputs else None

    return Case(name, step, params, init, xs)
