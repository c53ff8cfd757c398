"""The cells that people use: Flax's, an LSTM by hand, and a wave equation, which has no weights."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.support.adversarial.table import adversary, draw

DOUBLE = {"dtype": jnp.float64, "param_dtype": jnp.float64}
CELLS = {
    "simple": nn.SimpleCell(3, **DOUBLE),
    "lstm": nn.LSTMCell(3, **DOUBLE),
    "optimized_lstm": nn.OptimizedLSTMCell(3, **DOUBLE),
    "gru": nn.GRUCell(3, **DOUBLE),
    "mgu": nn.MGUCell(3, **DOUBLE),
    "conv_lstm": nn.ConvLSTMCell(2, kernel_size=(2,), **DOUBLE),
}


def drawn_like(shapes, seed):
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [draw(seed + i, *leaf.shape, scale=0.5) for i, leaf in enumerate(leaves)])


def carry_shapes(cell, x):
    return jax.eval_shape(lambda: cell.initialize_carry(jax.random.key(0), x.shape))


def variables_of(cell, x):
    shapes = jax.eval_shape(cell.init, jax.random.key(0), carry_shapes(cell, x), x)
    return drawn_like(shapes, 10)


def init_of(cell, x):
    return drawn_like(carry_shapes(cell, x), 50)


for name, cell in CELLS.items():
    x_shape = (2, 3, 2) if isinstance(cell, nn.ConvLSTMCell) else (2, 4)
    x = jax.ShapeDtypeStruct(x_shape, jnp.float64)
    adversary(
        functools.partial(variables_of, cell, x),
        functools.partial(init_of, cell, x),
        lambda n, x_shape=x_shape: draw(3, n, *x_shape),
        name=f"flax_{name}",
    )(cell.apply)


@adversary(
    lambda: {"w": draw(0, 7, 12, scale=0.5), "b": draw(1, 12)},
    lambda: (draw(2, 2, 3), draw(3, 2, 3)),
    lambda n: draw(4, n, 2, 4),
)
def lstm_by_hand(params, carry, x):
    """x and h beside each other in one product, of which one part could be hoisted."""
    c, h = carry
    i, f, g, o = jnp.split(jnp.concatenate([x, h], axis=1) @ params["w"] + params["b"], 4, axis=1)
    c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


@adversary(lambda: None, lambda: (draw(0, 6), draw(1, 6)), lambda n: draw(2, n))
def wave_equation(params, carry, x):
    u, before = carry
    after = 2 * u - before + 0.3 * (jnp.roll(u, 1) - 2 * u + jnp.roll(u, -1))
    after = after.at[2].add(x)
    return (after, u), after[4]
