"""Values and derivatives of the adversarial steps equal those of `jax.lax.scan`."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from bptt_jax._device.machine import Machine
from bptt_jax._lower import block
from bptt_jax._step.style import Style
from bptt_jax.errors import BudgetError
from bptt_jax.plans import length as length_of
from bptt_jax.plans import notation
from tests.support import comparison, forms
from tests.support.adversarial import TABLE
from tests.support.adversarial.running import (
    derivative_call,
    forward_over_reverse,
    gradient,
    gradient_of_part,
    gradient_over_uneven_batch,
    reverse_over_reverse,
    run_each,
)
from tests.support.adversarial.subsets import BATCHES, LONG, PARTS, TWICE, UNEVEN

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
BLOCKS = Repeat(3, Remat(Steps(4)))
NEST = Chain((Repeat(2, Remat(Repeat(2, Remat(Steps(2))))), Steps(3)))
REST = Chain((Repeat(2, Remat(Steps(4))), Steps(3)))
SMALL = Repeat(3, Remat(Steps(2)))
# To the cases in turn: a length, its plan, and a direction.
OPTIONS = ((12, BLOCKS, False), (11, REST, True), (12, BLOCKS, True), (11, REST, False))


def is_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if comparison.is_float(leaf))


@pytest.mark.one_in(23)
@pytest.mark.parametrize("name", TABLE)
def test_derivatives_equal_those_of_lax_scan(name):
    """With a plan that computes again, and without a budget. What gives second derivatives gives the gradient as well,
    so that is not compiled for itself.
    """
    entry, (length, plan, reverse) = TABLE[name], OPTIONS[list(TABLE).index(name) % 4]
    case = entry.case()
    theirs, ours = (functools.partial(scan, reverse=reverse) for scan in (lax.scan, bptt_jax.scan))
    calls = [
        derivative_call(forward_over_reverse, case, length, theirs),
        derivative_call(forward_over_reverse, case, length, functools.partial(ours, plan=plan)),
        derivative_call(reverse_over_reverse, case, length, functools.partial(ours, budget=None)),
    ]
    if not entry.conservative:
        calls.append(derivative_call(reverse_over_reverse, case, length, theirs))
    (first, change), (planned, our_change), (unbounded, our_transposed), *rest = run_each(*calls)
    transposed = rest[0][1] if rest else change
    assert is_finite((first, change, transposed))
    comparison.assert_same(planned, first, entry.tolerance)
    comparison.assert_same(unbounded, first, entry.tolerance)
    comparison.assert_same(our_change, change, 10 * entry.tolerance)
    comparison.assert_same(our_transposed, transposed, 10 * entry.tolerance)


@pytest.mark.one_in(19)
@pytest.mark.parametrize("name", TABLE)
def test_gradients_with_products_in_turn(monkeypatch, name):
    """What tight budgets lead to, here forced; blocks of an even and of an odd number of steps."""
    forms.force(monkeypatch, Style(merged=False, in_turn=True))
    monkeypatch.setattr(block, "is_large", lambda weight: True)
    entry = TABLE[name]
    scans = (lax.scan, functools.partial(bptt_jax.scan, plan=REST))
    theirs, ours = run_each(*(derivative_call(gradient, entry.case(), 11, scan) for scan in scans))
    comparison.assert_same(ours, theirs, entry.tolerance)


@pytest.mark.parametrize("name", ["without_a_gradient", "shared_left_operand"])
def test_gradients_with_all_products_by_block(monkeypatch, name):
    """As sizes would have it on other devices: hoisted, merged and deferred wherever that is possible."""
    monkeypatch.setattr(Machine, "hoisting_pays", lambda machine, weight, stacked: True)
    monkeypatch.setattr(Machine, "deferring_pays", lambda machine, weight, stacked: True)
    monkeypatch.setattr(Machine, "merging_pays", lambda machine, flops, rows: True)
    entry = TABLE[name]
    scans = (lax.scan, functools.partial(bptt_jax.scan, plan=REST))
    theirs, ours = run_each(*(derivative_call(gradient, entry.case(), 11, scan) for scan in scans))
    comparison.assert_same(ours, theirs, entry.tolerance)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", TWICE)
def test_reverse_over_reverse_through_recomputation(name):
    entry = TABLE[name]
    scans = (lax.scan, functools.partial(bptt_jax.scan, plan=BLOCKS))
    theirs, ours = run_each(*(derivative_call(reverse_over_reverse, entry.case(), 12, scan) for scan in scans))
    comparison.assert_same(ours, theirs, 10 * entry.tolerance)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("name", PARTS)
def test_gradient_of_one_argument(name):
    """Of the parameters alone, of the first carry alone, and of xs alone, by a plan of two levels."""
    entry = TABLE[name]
    case = entry.case()
    groups = [sum(map(comparison.is_float, jax.tree.leaves(tree))) for tree in (case.params, case.init, case.xs(11))]
    ends = np.cumsum(groups)
    parts = [slice(end - size, end) for end, size in zip(ends, groups, strict=True) if size]
    ours = functools.partial(bptt_jax.scan, plan=NEST)
    (expected, _), *results = run_each(
        derivative_call(gradient, case, 11, lax.scan),
        *(derivative_call(functools.partial(gradient_of_part, part), case, 11, ours) for part in parts),
    )
    for part, result in zip(parts, results, strict=True):
        comparison.assert_same(result, expected[part], entry.tolerance)


@pytest.mark.parametrize("name", sorted({name for name, _ in BATCHES})[::2])
def test_batch_of_gradients(name):
    """All inputs are batched, so the weights that the step closes over are tracers of an outer vmap."""
    entry = TABLE[name]
    scans = (lax.scan, functools.partial(bptt_jax.scan, plan=BLOCKS))
    theirs, ours = run_each(*(derivative_call(comparison.vmapped_grad, entry.case(), 12, scan) for scan in scans))
    comparison.assert_same(ours, theirs, entry.tolerance)


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("name", "batched"), BATCHES)
def test_gradient_of_a_batch(name, batched):
    """Of the float inputs some are batched and others shared; the batch is as large as the length."""
    entry = TABLE[name]
    case = entry.case()
    n_params = sum(map(comparison.is_float, jax.tree.leaves(case.params)))

    def derivative(loss, floats):
        one = {"first": 0, "carry": n_params, "last": len(floats) - 1}
        return comparison.grad_of_vmap(loss, floats, lambda i: batched == "all" or i == one[batched], size=6)

    scans = (lax.scan, functools.partial(bptt_jax.scan, plan=SMALL))
    theirs, ours = run_each(*(derivative_call(derivative, case, 6, scan) for scan in scans))
    comparison.assert_same(ours, theirs, entry.tolerance)


@pytest.mark.parametrize("name", UNEVEN)
def test_gradient_of_a_batch_of_integers_and_keys(name):
    entry = TABLE[name]
    scans = (lax.scan, functools.partial(bptt_jax.scan, plan=SMALL))
    theirs, ours = run_each(*(gradient_over_uneven_batch(entry.case(), scan) for scan in scans))
    comparison.assert_same(ours, theirs, entry.tolerance)


@pytest.mark.parametrize("name", ["shared_left_operand", "outputs_of_every_kind", "dropout_with_rbg_keys_in_xs"])
@pytest.mark.parametrize("plan", [Steps(0), Steps(1), Chain((Repeat(2, Remat(Steps(1))), Steps(1)))], ids=notation)
def test_blocks_of_one_step_and_of_none(name, plan):
    entry, length = TABLE[name], length_of(plan)
    scans = (lax.scan, functools.partial(bptt_jax.scan, plan=plan))
    theirs, ours = run_each(*(derivative_call(gradient, entry.case(), length, scan) for scan in scans))
    comparison.assert_same(ours, theirs, entry.tolerance)


@pytest.mark.parametrize("length", [49, 100])
@pytest.mark.parametrize("name", LONG)
def test_more_steps_than_a_block_may_have(name, length):
    """However a lowering divides a segment, and whatever is left over."""
    entry = TABLE[name]
    scans = (functools.partial(f, reverse=length == 49) for f in (lax.scan, bptt_jax.scan))
    theirs, ours = run_each(*(derivative_call(gradient, entry.case(), length, scan) for scan in scans))
    comparison.assert_same(ours, theirs, entry.tolerance)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", [*LONG, "flax_lstm"])
def test_smallest_budget(name):
    """What is done for speed and takes bytes is then left undone."""
    entry = TABLE[name]
    derivative, floats = derivative_call(gradient, entry.case(), 90, functools.partial(bptt_jax.scan, budget=1))
    with pytest.raises(BudgetError) as failure:
        jax.eval_shape(derivative, floats)
    scans = (lax.scan, functools.partial(bptt_jax.scan, budget=failure.value.smallest_bytes))
    theirs, ours = run_each(*(derivative_call(gradient, entry.case(), 90, scan) for scan in scans))
    comparison.assert_same(ours, theirs, entry.tolerance)


@pytest.mark.parametrize("name", ["shared_left_operand", "outputs_of_every_kind", "read_only_in_the_carry"])
def test_jacobian(name):
    """A batch of cotangents, of inputs that are not batched: of the last carry, and of outputs."""

    def derivative(loss, floats):
        def some(floats):
            carry, ys = loss(floats)[1]
            leaves = [leaf for tree in (carry, ys) for leaf in jax.tree.leaves(tree) if comparison.is_float(leaf)]
            return [jnp.sin(leaf.ravel()[-4:]) for leaf in leaves]

        return jax.jacrev(some)(floats)

    entry = TABLE[name]
    scans = (lax.scan, functools.partial(bptt_jax.scan, plan=BLOCKS))
    theirs, ours = run_each(*(derivative_call(derivative, entry.case(), 12, scan) for scan in scans))
    comparison.assert_same(ours, theirs, entry.tolerance)


@pytest.mark.parametrize("picked", [None, "carry", "x", "of x", "weight", "of weights", "hoistable product", "product"])
def test_gradient_of_one_result(picked):
    """Of an output, or of the last carry; the others have no cotangent."""
    case = TABLE["outputs_of_every_kind"].case()

    def derivative(loss, floats):
        def of_one(floats):
            carry, outputs = loss(floats)[1]
            result = carry["h"] if picked is None else outputs[picked]
            return comparison.real_sum(jnp.sin(result) * comparison.distinct_weights(result))

        return jax.value_and_grad(of_one)(floats)

    scans = (lax.scan, functools.partial(bptt_jax.scan, plan=BLOCKS))
    theirs, ours = run_each(*(derivative_call(derivative, case, 12, scan) for scan in scans))
    comparison.assert_same(ours, theirs, 1e-10)


@pytest.mark.slow
def test_on_four_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.support.adversarial.sharded"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal:") == 6
