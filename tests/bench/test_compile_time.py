"""Compile time does not grow with the length. Not part of the suite; run it on a quiet machine:

python -m pytest tests/bench/test_compile_time.py -s
"""

import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

import bptt_jax


def compile_seconds(length, budget):
    """Seconds to trace, lower and compile a gradient of an LSTM; a new cell each time, so nothing is remembered."""
    cell = nn.LSTMCell(64)
    carry = cell.initialize_carry(jax.random.key(0), (4, 64))
    variables = cell.init(jax.random.key(1), carry, jnp.zeros((4, 64), jnp.float32))
    shape = jax.ShapeDtypeStruct((length, 4, 64), jnp.float32)

    def loss(variables, xs):
        return bptt_jax.scan(lambda c, x: cell.apply(variables, c, x), carry, xs, budget=budget)[0][1].sum()

    start = time.perf_counter()
    jax.jit(jax.grad(loss)).lower(variables, shape).compile()
    return time.perf_counter() - start


def test_compile_time_does_not_grow_with_the_length():
    compile_seconds(100, None)  # what is paid once by the process
    ratios = {}
    for budget in (None, "20%", "8%"):
        pairs = [(compile_seconds(1_000, budget), compile_seconds(100_000, budget)) for _ in range(5)]
        ratios[budget] = statistics.median(long / short for short, long in pairs)
        print(f"budget {budget}: compiling T=100,000 takes {ratios[budget]:.2f} of T=1,000 ({pairs[0][0]:.2f} s)")
    assert max(ratios.values()) <= 1.5
