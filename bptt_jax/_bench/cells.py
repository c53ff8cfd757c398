"""The steps measured, as a table: recurrent cells, a convolutional one, and waves on a grid.

Everything is in single precision and made anew for each problem, because caches of one compilation must not serve
another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax._jaxprs.types import Tree

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A step to scan, and the argument to differentiate with respect to.

    Attributes:
      step: (params, carry, x) -> (carry, y).
      params, init: pytrees of arrays; the params of a step without weights are None.
      x: one input, as a shape.
    """

    step: Step
    params: Any
    init: Any
    x: jax.ShapeDtypeStruct

    @property
    def param_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    @property
    def argument(self) -> int:
        """Index into (params, init, xs) of the argument differentiated: the weights, or the first carry without any."""
        return 1 if self.params is None else 0

    def xs_shape(self, length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((length, *self.x.shape), self.x.dtype)

    def xs(self, length: int) -> jax.Array:
        return jax.random.normal(jax.random.key(3), (length, *self.x.shape), self.x.dtype)


def _linen(name: str, *x_shape: int, **options: Any) -> Problem:
    import flax.linen as nn  # here, because the other cells do not need it

    cell = getattr(nn, name)(x_shape[-1], **options)
    x = jax.ShapeDtypeStruct(x_shape, jnp.float32)
    init = cell.initialize_carry(jax.random.key(0), x.shape)
    params = cell.init(jax.random.key(1), init, jnp.zeros(x.shape, x.dtype))
    return Problem(lambda params, carry, x: (cell.apply(params, carry, x)[0], None), params, init, x)


def _plain_lstm(batch: int, width: int) -> Problem:
    def step(params: Tree, carry: Tree, x: Tree) -> tuple[Any, None]:
        c, h = carry
        gates = x @ params["Wx"] + h @ params["Wh"] + params["b"][None]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

    keys = jax.random.split(jax.random.key(0))
    weights = [jax.random.normal(key, (width, 4 * width), jnp.float32) * width**-0.5 for key in keys]
    params = {"Wx": weights[0], "Wh": weights[1], "b": jnp.zeros(4 * width, jnp.float32)}
    zeros = jnp.zeros((batch, width), jnp.float32)
    return Problem(step, params, (zeros, zeros), jax.ShapeDtypeStruct(zeros.shape, zeros.dtype))


def _waves(batch: int, width: int, force: Callable[[jax.Array], jax.Array] | None) -> Problem:
    """Leapfrog for u_tt = c² Δu + force(u) + a source at the centre, on width × width points with u = 0 around them.

    (c·dt/dx)² = 0.25 is half the limit of stability in two dimensions; dt² = 0.01 multiplies force and source.
    """

    def step(_: Any, carry: Tree, x: Tree) -> tuple[Any, Any]:
        u, before = carry
        around = jnp.pad(u, ((0, 0), (1, 1), (1, 1)))
        vertical = around[:, 2:, 1:-1] + around[:, :-2, 1:-1]
        horizontal = around[:, 1:-1, 2:] + around[:, 1:-1, :-2]
        after = 2 * u - before + 0.25 * (vertical + horizontal - 4 * u)
        if force is not None:
            after += 0.01 * force(u)
        return (after.at[:, width // 2, width // 2].add(0.01 * x), u), None

    bump = jnp.exp(-(jnp.linspace(-3, 3, width, dtype=jnp.float32) ** 2))
    u = jnp.broadcast_to(bump[:, None] * bump[None, :], (batch, width, width))
    return Problem(step, None, (u, u), jax.ShapeDtypeStruct((), jnp.float32))


# Name -> (batch, width) -> Problem. The width is the number of features of carry and input, or the side of the grid.
CELLS: dict[str, Callable[[int, int], Problem]] = {
    "lstm": _plain_lstm,
    "flax-lstm": lambda batch, width: _linen("LSTMCell", batch, width),
    "flax-optimized-lstm": lambda batch, width: _linen("OptimizedLSTMCell", batch, width),
    "flax-gru": lambda batch, width: _linen("GRUCell", batch, width),
    "flax-conv-lstm": lambda batch, width: _linen("ConvLSTMCell", batch, 16, 16, width, kernel_size=(3, 3)),
    "wave": lambda batch, width: _waves(batch, width, None),
    # The wave equation is linear, so its gradient needs no residuals and lax.scan keeps none. The nonlinear force of
    # sine-Gordon adds some.
    "sine-gordon": lambda batch, width: _waves(batch, width, lambda u: -jnp.sin(u)),
}
OTHER_SIZES = {"flax-conv-lstm": (2, 8), "wave": (1, 128), "sine-gordon": (1, 128)}


def default_size(cell: str) -> tuple[int, int]:
    """The (batch, width) of a cell if nothing else is asked for."""
    return OTHER_SIZES.get(cell, (16, 256))
