"""Steps drawn at random: gradients are those of `jax.lax.scan`, and bytes are within what was asked.

`python -m tests.audit --kinds --random 100` draws as many as one likes, for the bytes.
"""

import functools

import jax.numpy as jnp
import pytest
from jax import lax

import bptt_jax
from tests import audit
from tests.audit.kinds import RANDOM
from tests.support import comparison
from tests.support.quick_to_compile import as_users_do
from tests.support.random_steps import PARTS, in_16_bits, random_step

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
LENGTH = 23
# Each set has every part in it.
OF_GRADIENTS, OF_BYTES = (1, 3, 7, 11, 18, 44), (101, 102, 111, 114, 116, 124)


@pytest.mark.parametrize(
    ("seeds", "dtype", "missing"), [(OF_GRADIENTS, jnp.float64, {in_16_bits}), (OF_BYTES, jnp.float32, set())]
)
def test_every_part_is_drawn(seeds, dtype, missing):
    drawn = {name for seed in seeds for name in random_step(seed, dtype).name.split(", ")}
    assert drawn == {part.__name__ for part in {*PARTS} - missing}


@pytest.mark.one_in(7)
@pytest.mark.parametrize("seed", OF_GRADIENTS)
def test_gradients(seed):
    case = random_step(seed, jnp.float64)
    theirs = comparison.value_and_grad(*comparison.make_loss(case, LENGTH, lax.scan))
    for lowering in (None, "nested"):
        options = {"lowering": lowering, "verify": False}
        smallest = comparison.smallest_budget(case, LENGTH, **options)
        for budget in (smallest, 2 * smallest, None):
            scan = functools.partial(bptt_jax.scan, budget=budget, **options)
            ours = comparison.value_and_grad(*comparison.make_loss(case, LENGTH, scan))
            comparison.assert_same(ours, theirs, tolerance=1e-9)


def findings(lowering):
    """What the smallest budget of each seed and one for everything led to."""
    cases = [audit.Case(f"{RANDOM}-{seed}", 100, lowering) for seed in OF_BYTES]
    found = [finding for case in cases for finding in audit.audit(case, 2)]
    return [(str(finding), finding.measured, finding.asked) for finding in found]


in_sweep, in_nest = functools.partial(findings, "sweep"), functools.partial(findings, "nested")


@pytest.mark.usefixtures("implicit_broadcasting")
@pytest.mark.parametrize("seed", [102, 7006])
def test_a_whole_program_takes_what_its_check_says(seed):
    """A key in the carry, of which no derivative needs the random bits, was advanced in the backward pass once more."""
    case = audit.Case(f"{RANDOM}-{seed}", 100)
    problem = case.problem()
    finding = audit.examine(case, problem, audit.smallest_budget(case, problem))
    print(finding)
    assert finding.measured == finding.checked


@pytest.mark.usefixtures("implicit_broadcasting")
def test_small_budgets_are_checked_where_everything_seems_to_fit():
    """Loops of random bits, which no estimate has, are half of the bytes of a step of single numbers."""
    case = audit.Case(f"{RANDOM}-1007", 100, "sweep", "all")
    finding = audit.examine(case, case.problem(), 5384)
    assert finding.programs >= 1
    assert finding.measured <= finding.asked


@pytest.mark.slow
@pytest.mark.parametrize("function", ["in_sweep", "in_nest"])
def test_bytes(function):
    """With XLA's own settings: axes of length 1 are among what is drawn."""
    for finding, measured, asked in as_users_do(__name__, function):
        print(finding)
        assert measured <= asked
