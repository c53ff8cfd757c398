"""Kernel launches on an H100 against `lax.scan`; compiled for one (`tests/support/targets.py`), none is needed.

python -m pytest tests/bench/test_launches_h100.py -s -o addopts=""
"""

import functools

import jax
import pytest
from jax import lax

from bptt_jax._bench.cells import CELLS, default_size
from bptt_jax._bench.launches import launches
from bptt_jax._bench.peers import Scan, gradient, ours
from tests.support.targets import h100, or_skip

LENGTH = 1000
MIB = 2**20


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users compile."""


@functools.cache
def measured(cell: str, scan: Scan) -> tuple[int, int]:
    """The launches and temporary bytes on an H100 of the gradient of a cell of its default size."""
    sharding = jax.sharding.SingleDeviceSharding(or_skip(h100))
    problem = CELLS[cell](*default_size(cell))
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (problem.params, problem.init, problem.xs_shape(LENGTH)),
    )
    compiled = jax.jit(gradient(problem, scan)).lower(*arguments).compile()
    return launches(compiled.as_text()), compiled.memory_analysis().temp_size_in_bytes


def ratio_to_lax_scan(cell: str, percent: float | None) -> float:
    """The launches within so many per cent of the bytes of `lax.scan`, of its launches."""
    theirs, scan_bytes = measured(cell, lax.scan)
    budget = None if percent is None else int(percent / 100 * scan_bytes)
    count, temp_bytes = measured(cell, ours(budget=budget, target=or_skip(h100)))
    share = "no budget" if budget is None else f"{percent} % = {budget / MIB:.1f} MiB"
    print(
        f"\n{cell}: lax.scan {theirs:,} launches, {scan_bytes / MIB:.1f} MiB; bptt_jax, {share}: {count:,} launches, "
        f"{temp_bytes / MIB:.1f} MiB, ratio {count / theirs:.3f}"
    )
    assert budget is None or temp_bytes <= budget
    return count / theirs


@pytest.mark.parametrize(("percent", "most"), [(5, 0.36), (2.5, 0.46), (None, 0.25)])
def test_launches_against_lax_scan(percent, most):
    assert ratio_to_lax_scan("lstm", percent) <= most


@pytest.mark.parametrize(("percent", "most"), [(5, 0.80), (None, 0.55)])
def test_launches_against_lax_scan_unrolled_as_much(percent, most):
    unrolled, _ = measured("lstm", functools.partial(lax.scan, unroll=4))
    plain, _ = measured("lstm", lax.scan)
    found = ratio_to_lax_scan("lstm", percent) * plain / unrolled
    print(f"ratio to lax.scan(unroll=4), {unrolled:,} launches: {found:.3f}")
    assert found <= most


@pytest.mark.parametrize("cell", ["flax-lstm", "flax-optimized-lstm", "flax-gru"])
def test_launches_of_flax_cells(cell):
    assert ratio_to_lax_scan(cell, 5) <= 0.40


def test_launches_of_a_small_grid():
    """Of sine-Gordon's equation on 128 x 128 points, whose step has no products."""
    assert ratio_to_lax_scan("sine-gordon", None) <= 0.30
