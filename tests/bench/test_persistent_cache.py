"""The first gradient of a process, with JAX's persistent compilation cache empty and filled. Not part of the suite; run
it on a quiet machine:

python -m pytest tests/bench/test_persistent_cache.py -n 0 -s -o addopts=""
"""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import time
import bptt_jax, flax.linen as nn, jax, jax.numpy as jnp

layer, xs = bptt_jax.linen.RNN(nn.LSTMCell(256), budget="5%"), jnp.ones((16, 1000, 256))
variables = layer.init(jax.random.key(0), xs)
gradient = jax.jit(jax.grad(lambda variables, xs: layer.apply(variables, xs)[:, -1].sum()))
start = time.perf_counter()
gradient.lower(variables, xs).compile()
print(time.perf_counter() - start)
"""


@pytest.fixture(autouse=True)
def strict_jax():
    """Nothing is run in this process."""


def seconds(cache):
    settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


def test_a_second_process_compiles_less(tmp_path):
    first, second = seconds(tmp_path), seconds(tmp_path)
    print(f"{first:.1f} s with an empty cache, {second:.1f} s with a filled one")
    assert second < 0.7 * first
