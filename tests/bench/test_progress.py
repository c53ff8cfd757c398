"""The time of a bar of progress: programs with one beside the same without. Not part of the suite; on a quiet machine:

python -m pytest tests/bench/test_progress.py -s -o addopts=""
"""

import functools
import io
import statistics
import time

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import bptt_jax
from bptt_jax._bench.cells import CELLS
from bptt_jax._progress import display

PAIRS = 21
MOST = 1.02
MIB = 2**20


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users run."""


@pytest.fixture(autouse=True, params=["rich", "lines"])
def drawn(request, monkeypatch):
    """Bars are drawn, though not on a terminal."""
    made = display.Lines(io.StringIO())
    if request.param == "rich":
        made = display.RichBars(Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(display, "_bars", display.Bars(lambda: made))
    yield request.param
    if request.param == "rich":
        made.stop()


def seconds(program, arguments):
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    jax.effects_barrier()
    return time.perf_counter() - start


def ratio(make, arguments):
    """The median over pairs of runs, in turns the one and the other first; and the median time without a bar."""
    with_bar, without = (make(progress).lower(*arguments).compile() for progress in ("training", None))
    pairs = []
    for i in range(PAIRS + 1):
        found = {}
        for program in (with_bar, without)[:: 1 if i % 2 else -1]:
            found[program] = seconds(program, arguments)
        pairs.append((found[with_bar], found[without]))
    del pairs[0]
    return statistics.median(a / b for a, b in pairs), statistics.median(b for _, b in pairs)


def report(name, drawn, found):
    print(f"\n{name}, {drawn}: {found[0]:.4f} of {found[1]:.2f} s")
    assert found[0] <= MOST


@pytest.mark.parametrize("budget", [None, "5%"])
def test_an_lstm_of_2000_steps(budget, drawn):
    problem = CELLS["lstm"](16, 256)

    def make(progress):
        def loss(params, init, xs):
            step = functools.partial(problem.step, params)
            carry, _ = bptt_jax.scan(step, init, xs, budget=budget, progress=progress)
            return sum(map(jnp.sum, carry))

        return jax.jit(jax.grad(loss))

    arguments = problem.params, problem.init, problem.xs(2000)
    report(f"lstm (16, 256), budget {budget}", drawn, ratio(make, arguments))


def small(progress, xs, **options):
    """The sum of the last carry of a step of eight numbers."""
    scan = functools.partial(bptt_jax.scan, progress=progress, **options)
    return scan(lambda carry, x: (jnp.tanh(0.9 * carry + x), None), jnp.zeros(8), xs)[0].sum()


@pytest.mark.parametrize("differentiated", [True, False])
def test_a_million_small_steps(differentiated, drawn):
    def make(progress):
        loss = functools.partial(small, progress, budget=MIB)
        return jax.jit(jax.grad(loss) if differentiated else loss)

    xs = jnp.ones((10**6, 8))
    report(f"10^6 small steps, {differentiated=}", drawn, ratio(make, (xs,)))
