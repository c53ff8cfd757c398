"""Steps drawn at random: gradients are those of `jax.lax.scan`, and bytes are within what was asked.

`python -m tests.audit --kinds --random 100` draws as many as one likes, for the bytes.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import bptt_jax
from bptt_jax.errors import BudgetError
from tests import audit, comparison
from tests.audit.kinds import RANDOM
from tests.random_steps import random_step
from tests.slow import one_in

LENGTH = 23


@pytest.fixture(autouse=True)
def implicit_broadcasting():
    """What steps of users do."""
    jax.config.update("jax_numpy_rank_promotion", "allow")
    jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.mark.parametrize("seed", one_in(5, range(20)))
def test_gradients(seed):
    case = random_step(seed, jnp.float64)
    theirs = comparison.value_and_grad(*comparison.make_loss(case, LENGTH, lax.scan))
    for differentiation in ("reverse", "any"):

        def ours(budget, differentiation=differentiation):
            options = {"budget": budget, "differentiation": differentiation, "calibrate": False}
            return comparison.make_loss(case, LENGTH, functools.partial(bptt_jax.scan, **options))

        loss, floats = ours(1)
        with pytest.raises(BudgetError) as info:
            jax.eval_shape(jax.grad(loss, has_aux=True), floats)
        for budget in (info.value.smallest_bytes, 2 * info.value.smallest_bytes, None):
            comparison.assert_same(comparison.value_and_grad(*ours(budget)), theirs, tolerance=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("differentiation", ["reverse", "any"])
@pytest.mark.parametrize("seed", range(100, 105))
def test_bytes(seed, differentiation):
    case = audit.Case(f"{RANDOM}{seed}", 100, differentiation)
    for finding in audit.audit(case, 3):
        print(finding)
        assert finding.measured <= finding.predicted <= finding.asked
