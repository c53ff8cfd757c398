"""Kernel launches on an H100 against `lax.scan`; compiled for one (`tests/support/targets.py`), none is needed.

python -m pytest tests/bench/test_launches_h100.py -s -o addopts=""
"""

import functools

import jax
import pytest
from jax import lax

from bptt_jax._bench.cells import CELLS
from bptt_jax._bench.launches import launches
from bptt_jax._bench.peers import Scan, gradient, ours
from tests.support.targets import h100, or_skip

LENGTH = 1000
MIB = 2**20


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users compile."""


@functools.cache
def measured(scan: Scan) -> tuple[int, int]:
    """The launches and temporary bytes of the gradient of a plain LSTM (16, 256) on an H100."""
    sharding = jax.sharding.SingleDeviceSharding(or_skip(h100))
    problem = CELLS["lstm"](16, 256)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (problem.params, problem.init, problem.xs_shape(LENGTH)),
    )
    compiled = jax.jit(gradient(problem, scan)).lower(*arguments).compile()
    return launches(compiled.as_text()), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("percent", "most"), [(5, 1.05), (2.5, 1.35), (None, 0.82)])
def test_launches_against_lax_scan(percent, most):
    theirs, scan_bytes = measured(lax.scan)
    budget = None if percent is None else int(percent / 100 * scan_bytes)
    count, temp_bytes = measured(ours(budget=budget))
    share = "no budget" if percent is None else f"{percent} % = {budget / MIB:.1f} MiB"
    print(
        f"\nlax.scan: {theirs:,} launches, {scan_bytes / MIB:.1f} MiB; bptt_jax with {share}: {count:,} launches, "
        f"{temp_bytes / MIB:.1f} MiB, ratio {count / theirs:.3f} (at most {most})"
    )
    assert count <= most * theirs
    assert budget is None or temp_bytes <= budget
