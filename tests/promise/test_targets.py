"""The promise on an H100 and on a TPU v5e, which are compiled for and need not be here."""

import functools

import jax
import jax.numpy as jnp
import pytest

import bptt_jax
from bptt_jax.errors import BudgetError, BudgetWarning
from tests.audit.kinds import KINDS
from tests.support import targets

SHARES = (None, "10%", "30%", "50%")  # None: the smallest budget


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users run."""


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("length", [300, 2000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [targets.h100, targets.v5e], ids=lambda target: target.__name__)
def test_what_xla_reports_is_within_what_was_asked(target, kind, length, share):
    device = targets.or_skip(target)
    problem = KINDS[kind]()
    params, init = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)), (problem.params, problem.init)
    )
    step, xs = functools.partial(problem.step, params), problem.xs(length)
    try:
        report = bptt_jax.explain(step, init, xs, budget=share or 1, target=device)
    except (BudgetError, BudgetWarning) as error:  # also where small arrays are padded to tiles
        report = bptt_jax.explain(step, init, xs, budget=error.smallest_bytes, target=device)
    budget = report.budget_bytes
    print(f"{kind}, {length} steps on {device}: asked {budget}, measured {report.measured_bytes}, {report.plan}")
    assert report.checks
    assert report.measured_bytes <= budget


@pytest.mark.parametrize("narrow", [jnp.float32, jnp.bfloat16])
def test_short_blocks_in_deep_loops_are_within_the_smallest_budget(narrow):
    """For an H100, whose parts of a step's products outweigh such a block where the batch is large."""
    device = targets.or_skip(targets.h100)
    weight = jnp.zeros((128, 128), jnp.float32)

    def step(carry, x):
        carry = jnp.tanh(carry.astype(narrow) @ weight.astype(narrow) + x.astype(narrow) @ weight.astype(narrow))
        return carry.astype(jnp.float32), None

    arguments = step, jnp.zeros((128, 128), jnp.float32), jnp.zeros((300, 128, 128), jnp.float32)
    with pytest.raises(BudgetError) as info:
        bptt_jax.explain(*arguments, budget=1, target=device)
    report = bptt_jax.explain(*arguments, budget=info.value.smallest_bytes, target=device)
    assert report.measured_bytes <= report.budget_bytes
