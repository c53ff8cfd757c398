"""What a block does outside its loop, forced each way, changes no gradient; and it is done where sizes say so."""

import functools
import itertools
from contextlib import nullcontext

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compute_on import compute_on
from jax.experimental.xla_metadata import set_xla_metadata

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from bptt_jax._device.machine import Machine
from bptt_jax._lower import block
from bptt_jax._step import sizes as block_sizes
from bptt_jax._step.style import Style
from bptt_jax._step.taps import by_halves
from tests.support import comparison, forms
from tests.support.steps import normal

# Blocks of an even and of an odd number of steps, and of one.
PLAN = Chain((Repeat(2, Remat(Steps(4))), Steps(3), Steps(1)))
STYLES = [Style(*given) for given in itertools.product((True, False), repeat=3)]


def lstm(width=4):
    cell = nn.LSTMCell(width, param_dtype=jnp.float64, dtype=jnp.float64)
    carry = cell.initialize_carry(jax.random.key(0), (3, width))
    xs = jax.random.normal(jax.random.key(2), (12, 3, width))
    return cell, cell.init(jax.random.key(1), carry, xs[0]), carry, xs


@pytest.mark.one_in(29)
@pytest.mark.parametrize(
    ("derivative", "outside", "style"),
    list(itertools.product(["value_and_grad", "forward_over_reverse", "reverse_over_reverse"], [True, False], STYLES)),
    ids=str,
)
def test_each_decision_gives_the_same_gradients(monkeypatch, style, outside, derivative):
    monkeypatch.setattr(Machine, "hoisting_pays", lambda machine, weight, stacked: outside)
    monkeypatch.setattr(Machine, "deferring_pays", lambda machine, weight, stacked: outside)
    monkeypatch.setattr(Machine, "merging_pays", lambda machine, flops, rows: True)
    monkeypatch.setattr(block, "is_large", lambda weight: True)
    ran, swept = forms.force(monkeypatch, style), functools.partial(bptt_jax.scan, plan=PLAN)
    cell, variables, carry, xs = lstm()

    def make(scan):
        def loss(inputs):
            variables, carry, xs = inputs
            (c, h), ys = scan(lambda c, x: cell.apply(variables, c, x), carry, xs)
            return jnp.sum(jnp.sin(c)) + jnp.sum(h**2) + jnp.sum(jnp.cos(ys)), ys

        return loss

    run = getattr(comparison, derivative)
    inputs = (variables, carry, xs)
    if derivative == "value_and_grad":
        ours, theirs = run(make(swept), inputs), run(make(lax.scan), inputs)
    else:
        leaves, tree = jax.tree.flatten(inputs)
        ours, theirs = (
            run(lambda leaves, scan=scan: make(scan)(jax.tree.unflatten(tree, leaves)), leaves)
            for scan in (swept, lax.scan)
        )
    comparison.assert_same(ours, theirs, 1e-9)
    for form in ran:
        summary = block_sizes.summary(form.vjp, form.style)
        assert (bool(summary.hoisted), bool(summary.deferred)) == (outside and style.features, outside)
    assert ran


def block_of(batch, width):
    cell = nn.LSTMCell(width)
    x = jnp.zeros((batch, width), jnp.float32)
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    variables = cell.init(jax.random.key(1), carry, x)
    return bptt_jax.explain(
        lambda c, x: cell.apply(variables, c, x), carry, jax.ShapeDtypeStruct((64, *x.shape), x.dtype)
    )


@pytest.mark.slow
def test_large_weights_are_used_by_block_and_small_ones_by_step():
    """A batch of 16 at width 256 writes a sixteenth of a weight for each product, one of 64 at width 128 half of it.

    From 16 rows on gates share one product.
    """
    single, wide, narrow = (block_of(*size).block for size in ((1, 256), (16, 256), (64, 128)))
    assert "float32[256, 1024]" in single.hoisted
    assert single.merged
    assert wide.hoisted == ("float32[256, 1024]",)
    assert "float32[256, 1024]" in wide.deferred
    assert wide.in_loop == ()
    assert narrow.hoisted == narrow.deferred == ()
    assert "2 of float32[128, 512]" in narrow.in_loop
    assert "products of x, by block" in str(block_of(1, 256))


def test_less_is_saved_than_by_jax():
    """Seven arrays of an LSTM's step (i, f, g, o, c, tanh of the new c, h) in place of twelve."""
    report = block_of(16, 256)
    assert report.profile.sweep.residual_bytes == 7 * 16 * 256 * 4
    assert report.profile.residual_bytes == 12 * 16 * 256 * 4


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    "mix",
    [
        lambda h, s, w: h + s,
        lambda h, s, w: s - h,
        lambda h, s, w: h - jnp.exp(s),
        lambda h, s, w: h + w[0, 0] * s,
    ],
)
def test_a_scalar_added_to_an_array(mix):
    """JAX adds it without broadcasting it first, so that its gradient is a sum over all axes."""
    w, init = 0.3 * normal(0, 8, 8, dtype=jnp.float64), normal(1, 4, 8, dtype=jnp.float64)
    xs = normal(2, 60, 4, 8, dtype=jnp.float64)

    def loss_with(scan):
        def loss(w, s):
            return scan(lambda c, x: (jnp.tanh(mix(c @ w + x, s, w)), None), init, xs)[0].sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    scalar = jnp.float64(0.3)
    expected = loss_with(lax.scan)(w, scalar)
    for budget in (None, "60%"):
        found = loss_with(functools.partial(bptt_jax.scan, budget=budget))(w, scalar)
        comparison.assert_same(found, expected, tolerance=1e-12)


def test_nothing_is_planned_for_gradients_that_there_are_not():
    """Of a matrix that the step makes, of a stopped or a rounded weight: nothing is deferred, held or summed."""
    w, init = normal(0, 64, 64, dtype=jnp.float32), jnp.zeros((32, 64), jnp.float32)
    xs = jax.ShapeDtypeStruct((500, 32, 64), jnp.float32)
    matrices = {
        "made": lambda: 0.5 * jnp.eye(64, dtype=jnp.float32) + jnp.tri(64, dtype=jnp.float32),
        "stopped": lambda: lax.stop_gradient(w),
        "rounded": lambda: jnp.round(w),
    }
    for name, matrix in matrices.items():

        def step(c, x, matrix=matrix):
            c = jnp.tanh(c @ matrix() + x + matrix()[:32])
            return c, c

        report = bptt_jax.explain(step, init, xs, budget="50%")
        assert report.block.deferred == report.block.in_loop == (), name
        assert report.profile.sweep.product_bytes == 0, name
        assert report.measured_bytes >= 0.85 * report.budget_bytes, name
        assert report.profile.sweep.fixed_bytes - 2 * report.profile.carry_bytes < 2 * w.nbytes, name  # no sum of it


CONTEXTS = {
    "plain": nullcontext,
    "metadata": functools.partial(set_xla_metadata, part="first"),
    "on the host": functools.partial(compute_on, "device_host"),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_equal_products_in_other_contexts_are_merged_with_the_right_weights(monkeypatch, context, first):
    """Weights on the left; two equal products that are not one equation, because one has metadata of its own."""
    monkeypatch.setattr(Machine, "merging_pays", lambda machine, flops, rows: True)
    w1, w2, init = normal(0, 4, 4) / 2, normal(1, 4, 4) / 2, normal(2, 4, 3)

    def step(weights, h, x):
        w1, w2 = weights
        made = {}
        for name in "abc"[first:] + "abc"[:first]:
            with CONTEXTS[context]() if name == "a" else nullcontext():
                made[name] = (w2 if name == "c" else w1) @ h
        return jnp.tanh(made["a"] * made["b"] + made["c"] + x), None

    def loss(scan, weights):
        return jnp.sum(jnp.sin(scan(functools.partial(step, weights), init, normal(3, 9, 4, 3))[0]))

    for derivative in (jax.value_and_grad, jax.jacfwd):
        ours, theirs = (derivative(functools.partial(loss, scan))((w1, w2)) for scan in (bptt_jax.scan, lax.scan))
        comparison.assert_same(ours, theirs, tolerance=1e-12)


def test_products_are_merged_in_the_contexts_of_their_own(monkeypatch):
    monkeypatch.setattr(Machine, "merging_pays", lambda machine, flops, rows: True)

    def step(carry, x):
        with set_xla_metadata(part="gates"):
            gates = carry @ normal(0, 4, 4), carry @ normal(1, 4, 4)
        return jnp.tanh(gates[0] + gates[1]), None

    gradient = jax.jit(jax.grad(lambda carry: bptt_jax.scan(step, carry, None, 9)[0].sum()))
    products = [line for line in gradient.lower(normal(2, 3, 4)).as_text().splitlines() if "dot_general" in line]
    assert any('part = "gates"' in line and "4x8x" in line for line in products), products


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_by_halves_counts_each_step_once_also_where_an_operand_is_infinite(n):
    left, cotangents = normal(0, n, 3).at[(n + 1) // 2 - 1, 0].set(jnp.inf), jnp.abs(normal(1, n, 2)) + 1

    def add(total, left, cotangents):
        return total + jnp.einsum("ti,tj->ij", left, cotangents)

    found = by_halves(add, jnp.zeros((3, 2)), left, cotangents)
    np.testing.assert_allclose(found, jnp.einsum("ti,tj->ij", left, cotangents), rtol=1e-12)
    assert jnp.isinf(found[0]).all()
