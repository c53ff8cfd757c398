"""A million steps of an LSTM in 64 MiB of temporaries: run to the end. Five minutes or so on two cores.

python -m pytest tests/bench/test_million_steps.py -s -o addopts=""
"""

import functools
import json
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bptt_jax

MIB = 2**20

STEPS, BATCH, WIDTH, INPUTS = 10**6, 4, 128, 16
BUDGET = 64 * MIB
SHORT = 5000


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users run."""


def problem(steps, dtype):
    """Parameters and inputs of a plain LSTM."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "Wx": jax.random.normal(keys[0], (INPUTS, 4 * WIDTH), dtype) * INPUTS**-0.5,
        "Wh": jax.random.normal(keys[1], (WIDTH, 4 * WIDTH), dtype) * WIDTH**-0.5,
        "b": jnp.zeros((1, 4 * WIDTH), dtype),
    }
    return params, jax.random.normal(keys[2], (steps, BATCH, INPUTS), dtype)


def gradient(scan):
    def loss(params, xs):
        def step(carry, x):
            c, h = carry
            i, f, g, o = jnp.split(x @ params["Wx"] + h @ params["Wh"] + params["b"], 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

        zeros = jnp.zeros((BATCH, WIDTH), xs.dtype)
        (c, h), _ = scan(step, (zeros, zeros), xs)
        return jnp.sum(c) + jnp.sum(h)

    return jax.jit(jax.grad(loss))


def compiled(scan, steps):
    return gradient(scan).lower(*jax.eval_shape(lambda: problem(steps, jnp.float32))).compile()


def main():
    """What runs in a process of its own: compiles, runs, and prints what it took as JSON."""
    program = compiled(functools.partial(bptt_jax.scan, budget=BUDGET), STEPS)
    params, xs = jax.block_until_ready(problem(STEPS, jnp.float32))
    start = time.perf_counter()
    found = jax.block_until_ready(program(params, xs))
    seconds = time.perf_counter() - start
    finite = all(bool(jnp.isfinite(leaf).all() & (leaf != 0).any()) for leaf in jax.tree.leaves(found))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    temporaries = program.memory_analysis().temp_size_in_bytes
    print(json.dumps({"temporaries": temporaries, "resident": resident, "seconds": seconds, "finite": finite}))


def test_a_million_steps_run_in_64_mib():
    run = subprocess.run(
        [sys.executable, "-m", "tests.bench.test_million_steps"], capture_output=True, text=True, timeout=3600
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    plain = compiled(lax.scan, STEPS).memory_analysis().temp_size_in_bytes
    print(
        f"\n{STEPS} steps: temporaries {found['temporaries'] / MIB:.1f} MiB, "
        f"resident {found['resident'] / MIB:.0f} MiB, {found['seconds']:.0f} s; "
        f"lax.scan asks for {plain / MIB:.0f} MiB of temporaries"
    )
    assert found["finite"]
    assert found["temporaries"] <= BUDGET
    assert found["resident"] < plain


def test_the_gradient_of_a_shorter_run_is_that_of_lax_scan_in_double_precision():
    """With as many levels of recomputation."""
    ours = functools.partial(bptt_jax.scan, budget=BUDGET * SHORT // STEPS + 3 * MIB)
    problem_in_single = problem(SHORT, jnp.float32)
    found = gradient(ours)(*problem_in_single)
    with jax.enable_x64(True):
        exact = gradient(lax.scan)(*jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), problem_in_single))
        assert all(leaf.dtype == np.float64 for leaf in exact.values())
    for name, expected in jax.tree.map(np.asarray, exact).items():
        error = np.abs(np.asarray(found[name]) - expected).max() / np.abs(expected).max()
        print(f"\n{name}: relative error {error:.1e}")
        assert error <= 1e-4


if __name__ == "__main__":
    main()
