"""The promise: XLA reports no more bytes than were asked for. `python -m tests.audit` is the whole audit of it."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax
from bptt_jax import Remat, Repeat, Steps, _calibrate, _choose, make_plan
from bptt_jax._time import time_of
from bptt_jax.errors import BudgetError
from tests import audit
from tests.audit import KINDS, LITTLE, Case
from tests.quick_to_compile import as_users_do
from tests.slow import one_in

# 2 budgets each, and 11 programs below.
CASES = [Case(kind, 997, "reverse", "all", True) for kind in KINDS]
CASES += [
    Case("lstm", 100, "reverse", "weights", False),
    Case("gru", 10_000, "reverse", "weights", True),
    Case("attention", 1000, "any", "weights", False),
    Case("stacked", 100, "any", "all", True),
    Case("convlstm", 1000, "any", "weights", True),
    Case("waves", 997, "any", "all", False),
    Case("bfloat16", 100, "any", "all", True),
]


@pytest.fixture(autouse=True)
def implicit_broadcasting():
    """What steps of users do, and Flax."""
    jax.config.update("jax_numpy_rank_promotion", "allow")
    jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_xla_reports_is_within_what_was_asked(case):
    problem = case.problem()
    smallest, *_, everything = audit.budgets(case, problem, 3)
    for asked in (smallest, (smallest + everything) // 2):
        finding = audit.examine(case, problem, asked)
        print(finding)
        assert finding.measured <= finding.predicted <= asked


@pytest.mark.parametrize("differentiation", ["reverse", "any"])
@pytest.mark.parametrize(("kind", "dtype"), [("waves", jnp.bfloat16), ("lstm", jnp.float16)])
def test_what_keeps_everything_in_16_bits_is_within_what_was_asked(kind, dtype, differentiation):
    case = Case(kind, 100, differentiation)
    problem = case.problem().of_type(dtype)
    everything = audit.decide(case, problem, None).predicted_bytes
    finding = audit.examine(case, problem, everything)
    print(finding)
    assert finding.measured <= finding.predicted <= everything


@pytest.mark.parametrize(("kind", "length"), [("gru", 997), ("stacked", 1000)])
def test_little_of_a_budget_is_used_only_where_no_faster_plan_fits(kind, length):
    case = Case(kind, length)
    problem = case.problem()
    smallest = audit.smallest_budget(case, problem)
    for asked in (smallest, 3 * smallest):
        finding = audit.examine(case, problem, asked)
        print(finding)
        assert finding.used >= LITTLE or not audit.could_be_faster(case, problem, finding)


@pytest.mark.parametrize("differentiation", ["reverse", "any"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_budget_is_the_smallest(kind, differentiation):
    """It is accepted; what it leads to is measured above."""
    case = Case(kind, 997, differentiation)
    problem = case.problem()
    smallest = audit.smallest_budget(case, problem)
    assert audit.decide(case, problem, smallest).predicted_bytes <= smallest
    with pytest.raises(BudgetError) as info:
        audit.decide(case, problem, smallest - 1)
    assert info.value.smallest_bytes == smallest


@pytest.mark.parametrize(("kind", "differentiation"), one_in(3, itertools.product(KINDS, ["reverse", "any"])))
def test_more_bytes_never_take_more_time(kind, differentiation):
    case = Case(kind, 1000, differentiation)
    problem = case.problem()
    choices = [audit.decide(case, problem, budget) for budget in audit.budgets(case, problem, 12)]
    times = [time_of(choice.plan, choice.profile) for choice in choices]
    # Of the plans that look fastest by a bound, a limited number is tried.
    assert all(more <= 1.001 * less for less, more in itertools.pairwise(times))


def step(carry, x):
    return jnp.tanh(carry * x), carry


ARGUMENTS = (jnp.ones((8, 16), jnp.float32), jnp.ones((300, 8, 16), jnp.float32))


WEIGHT = jnp.ones((128, 128), jnp.float32)


def with_product(carry, x):
    return jnp.tanh(carry @ WEIGHT * x), carry


@pytest.mark.parametrize(("step", "width", "programs"), [(step, 16, 2), (with_product, 128, 3)])
def test_at_most_three_programs_are_compiled_and_only_once(monkeypatch, step, width, programs):
    """Two for a step without products at the end of its blocks, whose bytes are on one line."""
    monkeypatch.setattr(_calibrate, "_known", {})
    compiled = []
    measured = _calibrate.temporaries_of_vjp
    monkeypatch.setattr(_calibrate, "temporaries_of_vjp", lambda *args: compiled.append(args) or measured(*args))
    init, xs = jnp.ones((8, width), jnp.float32), jnp.ones((300, 8, width), jnp.float32)
    first = bptt_jax.explain(step, init, xs, budget="50%")
    assert len(compiled) == first.effort.programs == programs
    assert f"calibrated by {programs} programs, with a margin of 2%" in str(first)
    assert re.search(rf"calibrating \d+\.\d\d s \({programs} programs, once\), compiling \d+\.\d\d s", str(first))
    # Another function, another length, another budget; but the same equations and shapes.
    again = bptt_jax.explain(lambda carry, x: step(carry, x), init, xs[:200], budget="40%")
    assert len(compiled) == first.effort.programs
    assert again.profile == first.profile


@pytest.mark.parametrize(("products", "middle"), [(0, []), (700, [6]), (20_000, [9])])
def test_a_block_is_measured_where_two_lines_meet(products, middle):
    """At 2 + (products - 100) / 180, here 5.3, if at all within the first fifth of the longest block, or else there."""
    profile = bptt_jax.StepProfile(
        8,
        100,
        block_bytes=100,
        left_bytes=20,
        product_bytes=products,
        block_steps=48,
        plain=bptt_jax.StepProfile(8, 200),
    )
    peaks = {n: max(200 * n, 300 + products + 20 * (n - 2)) for n in (2, 48)}
    assert _calibrate._turning(profile, peaks) == middle
    # Steeper than the sizes say, so that the lines do not meet: 0.6 of the products, in steps.
    steeper = _calibrate._turning(profile, {2: 1000, 48: 50_000})
    assert steeper == {0: [], 700: [4], 20_000: [16]}[products]


@pytest.mark.parametrize(
    ("peaks", "product_bytes", "with_parts"),
    [
        ([(2, 10), (4, 20), (48, 460)], 100, [(2, 10), (4, 20), (5, 1630), (48, 2060)]),
        ([(2, 10), (48, 470)], 1 << 30, [(2, 10), (3, 20 + (7 << 20) + (1 << 30)), (48, 470 + (7 << 20) + (1 << 30))]),
        ([(2, 10), (3, 470)], 100, [(2, 10), (3, 470)]),
        ([(2, 10)], 100, [(2, 10)]),
    ],
)
def test_on_accelerators_blocks_have_room_for_parts_of_products_of_16_bits(peaks, product_bytes, with_parts):
    """16 parts, or what fills the chip; but not in blocks as short as those that were measured."""
    assert _calibrate._with_parts(peaks, product_bytes) == with_parts


@pytest.mark.parametrize("options", [{}, {"plan": Repeat(3, Remat(Steps(100)))}])
def test_with_a_plan_or_without_a_budget_nothing_is_measured(monkeypatch, options):
    monkeypatch.setattr(_choose, "estimate", None)
    monkeypatch.setattr(_choose, "measure", None)
    jax.eval_shape(functools.partial(bptt_jax.scan, step, **options), *ARGUMENTS)


@pytest.mark.parametrize("budget", ["62%", "78%", "90%"])
def test_a_kept_rest_of_several_blocks_with_wide_products_is_within_the_budget(budget):
    weights = [jnp.ones(shape, jnp.float32) for shape in ((32, 128), (128, 128), (128, 32))]

    def step(carry, x):
        hidden = carry
        for weight in weights:
            hidden = jnp.tanh(hidden @ weight)
        return carry + hidden * x, carry

    init, xs = jnp.zeros((16, 32), jnp.float32), jnp.ones((100, 16, 32), jnp.float32)
    report = bptt_jax.explain(step, init, xs, budget=budget)
    assert report.measured_bytes <= report.predicted_bytes <= report.budget_bytes


def with_axes_of_length_1():
    """(measured, predicted, asked) for steps at batch 1: the smallest budget, and more."""
    cell = nn.LSTMCell(64)
    carry, x = (jnp.zeros((1, 64), jnp.float32),) * 2, jnp.ones((1, 512), jnp.float32)
    variables = cell.init(jax.random.key(0), carry, x[:, :64])
    weights = [jnp.ones(shape, jnp.float32) for shape in ((64, 64), (512, 128), (128, 64))]

    def projected(carry, x):
        carry = jnp.tanh(carry @ weights[0] + jnp.tanh(x @ weights[1]) @ weights[2])
        return carry, carry[:, :4]

    found = []
    for step, init, given in ((projected, carry[0], x), (functools.partial(cell.apply, variables), carry, x[:, :64])):
        xs = jnp.broadcast_to(given, (1000, *given.shape))
        report = functools.partial(bptt_jax.explain, step, init, xs, differentiation="any")
        with pytest.raises(BudgetError) as info:
            report(budget=1)
        reports = [report(budget=int(factor * info.value.smallest_bytes)) for factor in (1, 1.1, 1.3)]
        found += [(one.measured_bytes, one.predicted_bytes, one.budget_bytes) for one in reports]
    return found


def test_loops_over_single_steps_are_not_charged_the_copies_of_a_nest():
    weight = jnp.ones((512, 4), jnp.float32)
    init, xs = jnp.zeros((1, 4), jnp.float32), jnp.zeros((1000, 1, 512), jnp.float32)
    explain = functools.partial(
        bptt_jax.explain, lambda c, x: (jnp.tanh(c + x @ weight), None), init, xs, differentiation="any"
    )
    with pytest.raises(BudgetError) as info:
        explain(budget=1)
    smallest = info.value.smallest_bytes
    assert smallest < 40_000  # where the nest copies two megabytes
    with pytest.raises(BudgetError):
        explain(budget=smallest - 1)
    for budget, plan in ((smallest, Repeat(1000, Remat(Steps(1)))), (50_000, Steps(1000))):
        report = explain(budget=budget)
        assert report.plan == plan
        assert report.measured_bytes <= report.predicted_bytes <= budget


@pytest.mark.parametrize("differentiation", ["reverse", "any"])
def test_float8_is_within_the_budget(differentiation):
    narrow, wide = jnp.float8_e4m3fn, jnp.float32

    def step(carry, x):
        return jnp.tanh(carry.astype(wide) + x.astype(wide)).astype(narrow), None

    arguments = step, jnp.zeros((8, 64), narrow), jnp.zeros((300, 8, 64), narrow)
    with pytest.raises(BudgetError) as info:
        bptt_jax.explain(*arguments, budget=1, differentiation=differentiation)
    for budget in (info.value.smallest_bytes, "100%"):
        report = bptt_jax.explain(*arguments, budget=budget, differentiation=differentiation)
        assert report.measured_bytes <= report.predicted_bytes <= report.budget_bytes


def test_arrays_with_axes_of_length_1_are_within_the_budget():
    """XLA copies some of them whole, which took several times such budgets."""
    for measured, predicted, asked in as_users_do(__name__, "with_axes_of_length_1"):
        print(measured, predicted, asked)
        assert measured <= predicted <= asked


@pytest.mark.parametrize(("differentiation", "margin"), [("reverse", 0.05), ("any", 0.08)])
def test_without_calibration_nothing_is_compiled_and_the_margin_is_larger(monkeypatch, differentiation, margin):
    monkeypatch.setattr(_calibrate, "temporaries_of_vjp", None)

    def gradient(**options):
        return jax.grad(lambda init: jnp.sum(bptt_jax.scan(step, init, ARGUMENTS[1], **options)[0]))(ARGUMENTS[0])

    options = {"budget": "60%", "differentiation": differentiation}
    np.testing.assert_allclose(gradient(calibrate=False, **options), gradient())
    report = bptt_jax.explain(step, *ARGUMENTS, calibrate=False, **options)
    assert report.profile.margin == margin
    assert report.effort.programs == 0
    assert f"estimated from shapes, with a margin of {margin:.0%}" in str(report)
    assert report.measured_bytes <= report.predicted_bytes <= report.budget_bytes


def test_calibrate_must_be_a_bool():
    with pytest.raises(TypeError, match="calibrate must be True or False, got 'yes'"):
        bptt_jax.scan(step, *ARGUMENTS, calibrate="yes")


def test_the_calibrated_profile_plans_as_scan_does():
    profile = bptt_jax.profile(step, ARGUMENTS[0], ARGUMENTS[1][0], calibrate=True)
    report = bptt_jax.explain(step, *ARGUMENTS, budget="50%")
    assert make_plan(profile, 300, "50%") == report.plan
    assert profile == report.profile


def test_a_small_budget_names_the_copies_that_no_plan_prevents():
    init, xs = jnp.ones(256, jnp.bfloat16), jnp.ones((1000, 256), jnp.bfloat16)
    with pytest.raises(BudgetError, match=r"that XLA makes of all xs or ys\. The largest share is copies"):
        bptt_jax.explain(lambda carry, x: (jnp.tanh(carry + x), None), init, xs, budget=999)


def test_a_small_budget_names_what_dominates_it():
    weights = jnp.ones((256, 256))
    with pytest.raises(BudgetError) as info:
        bptt_jax.explain(
            lambda c, x: (jnp.tanh(c @ weights + x), None), jnp.ones(256), jnp.ones((100, 256)), budget=999
        )
    error = info.value
    fixed, residuals, carries = error.shares.values()
    assert fixed + residuals + carries == error.smallest_bytes
    assert f"{fixed:,} bytes for the part that does not grow with the length" in str(error)
    assert "carries (2,048 bytes each)" in str(error)
    assert "The largest share is the part that does not grow with the length." in str(error)
    assert "The budget is below the part that does not grow with the length" in str(error)


@pytest.mark.parametrize(
    ("shape", "dtype", "tiled"),
    [
        ((), jnp.float32, 4),
        ((64,), jnp.float32, 8 * 128 * 4),
        ((4, 64), jnp.float32, 8 * 128 * 4),
        ((16, 128), jnp.float32, 16 * 128 * 4),
        ((2, 12, 12, 4), jnp.float32, 2 * 12 * 16 * 128 * 4),
        ((9, 129), jnp.float64, 16 * 256 * 8),
    ],
)
def test_a_tpu_keeps_arrays_in_tiles_of_8_by_128(shape, dtype, tiled):
    assert _calibrate._tiled_bytes(jax.ShapeDtypeStruct(shape, dtype)) == tiled
