"""What calibration measures, how often, and what it makes of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax
from bptt_jax import _calibrate, make_plan


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
    measured = _calibrate.temporaries_of_gradient
    monkeypatch.setattr(_calibrate, "temporaries_of_gradient", lambda *args: compiled.append(args) or measured(*args))
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
    ("product_bytes", "parts"),
    [(0, 0), (100, 1600), (1 << 20, (7 << 20) + (1 << 20)), (1 << 30, (7 << 20) + (1 << 30))],
)
def test_on_accelerators_blocks_have_room_for_parts_of_products_of_16_bits(product_bytes, parts):
    """16 parts, or what fills the chip; but the shortest block has what was measured."""
    peaks = [(2, 10), (4, 20), (48, 460)]
    with_parts = [(2, 10), (4, 20 + parts), (48, 460 + parts)]
    assert _calibrate._with_parts(peaks, product_bytes) == with_parts


def with_rule(kept):
    """A step whose rule keeps so many arrays; JAX prints all of them alike."""

    @jax.custom_vjp
    def function(carry):
        return jnp.tanh(carry)

    def forward(carry):
        return jnp.tanh(carry), [jnp.sin(carry * i) for i in range(kept)]

    function.defvjp(forward, lambda saved, ct: (ct * sum(saved),))
    return lambda carry, x: (function(carry) + x, None)


def test_steps_with_other_rules_are_measured_apart(monkeypatch):
    monkeypatch.setattr(_calibrate, "_known", {})
    arguments = jnp.ones((8, 64), jnp.float32), jnp.ones((300, 8, 64), jnp.float32)
    few, many, again = (bptt_jax.explain(with_rule(kept), *arguments, budget=600_000) for kept in (1, 20, 1))
    assert many.measured_bytes <= many.predicted_bytes <= 600_000
    assert many.plan != few.plan == again.plan
    assert few.effort.programs == many.effort.programs == len(_calibrate._known) - 1 == 1


def test_gradients_are_charged_an_array_of_their_own_only_where_loops_do_not_wait():
    def copied_bytes(step):
        return bptt_jax.profile(step, *2 * [jnp.ones(64, jnp.float32)], lowering="nested").copied_bytes

    assert copied_bytes(lambda carry, x: (0.5 * carry + x, 2 * x)) == 256
    assert copied_bytes(lambda carry, x: (0.5 * carry + x, x)) == 0  # of outputs that are inputs JAX makes no array
    assert copied_bytes(lambda carry, x: (jnp.tanh(carry + x), 2 * x)) == 0
    assert copied_bytes(lambda carry, x: (0.5 * carry + x, x[:32])) == 0


@pytest.mark.parametrize(("lowering", "margin"), [(None, 0.05), ("nested", 0.08)])
def test_without_calibration_nothing_is_compiled_and_the_margin_is_larger(monkeypatch, lowering, margin):
    monkeypatch.setattr(_calibrate, "temporaries_of_gradient", None)

    def gradient(**options):
        return jax.grad(lambda init: jnp.sum(bptt_jax.scan(step, init, ARGUMENTS[1], **options)[0]))(ARGUMENTS[0])

    options = {"budget": "60%", "lowering": lowering}
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
