"""Batch-major layers beside time-major ones. Not part of the suite; run it on a quiet machine:

python -m pytest tests/bench/test_layouts.py -s -o addopts=""
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import bptt_jax
from tests.bench.test_vmap import compiled, ratio

LENGTH = 500
CELLS = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users run."""


def program(cell, batch, width, time_major, wrt, make, **call):
    """A compiled gradient of a loss on outputs, or the outputs for `wrt` None, and its arguments."""
    layer = make(CELLS[cell](width))
    xs = jax.random.normal(jax.random.key(0), (batch, LENGTH, width), jnp.float32)
    xs = jnp.swapaxes(xs, 0, 1) if time_major else xs
    variables = layer.init(jax.random.key(1), xs[:1, :1])
    if call.get("seq_lengths"):
        call["seq_lengths"] = jnp.arange(batch) * 7 % LENGTH + 1

    def outputs(variables, xs):
        return layer.apply(variables, xs, time_major=time_major, **call)

    def loss(variables, xs):
        return jnp.sum(outputs(variables, xs) ** 2)

    arguments = variables, xs
    return compiled(outputs if wrt is None else jax.grad(loss, wrt), *arguments)[0], arguments


@pytest.mark.parametrize("call", [{}, {"reverse": True}, {"reverse": True, "seq_lengths": True}], ids=str)
@pytest.mark.parametrize("wrt", [(0,), (0, 1), None], ids=["weights", "all", "evaluation"])
@pytest.mark.parametrize("budget", ["5%", None])
@pytest.mark.parametrize(("batch", "width"), [(64, 128), (16, 256)])
@pytest.mark.parametrize("cell", CELLS)
def test_batch_major_takes_the_time_of_time_major(cell, batch, width, budget, wrt, call):
    make = functools.partial(bptt_jax.linen.RNN, budget=budget)
    (batch_major, arguments), (time_major, moved) = (
        program(cell, batch, width, is_time_major, wrt, make, **call) for is_time_major in (False, True)
    )
    flax, _ = program(cell, batch, width, False, wrt, nn.RNN, **call)
    of_time_major, of_flax = (
        ratio(batch_major, time_major, arguments, moved),
        ratio(batch_major, flax, arguments, arguments),
    )
    print(f"{cell} {batch}x{width} {budget} {call}: {of_time_major:.3f} of time-major, {of_flax:.3f} of Flax's")
    assert (of_flax if wrt is None else of_time_major) <= 1.03  # an evaluation is the plain loop, as Flax's
