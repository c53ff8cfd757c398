"""A result that the loss does not read has no part in the gradient, also where its derivative is infinite.

In `jax.lax.scan` its cotangent is a symbolic zero. A zero of numbers would make NaN of a norm or a logarithm at zero,
which people log. Where `jax.lax.scan` itself gives NaN, so does this.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from bptt_jax._device.machine import Machine
from bptt_jax._jaxprs.equations import read_by
from bptt_jax._lower.differentiated import Differentiated
from bptt_jax._lower.nested import Nested
from bptt_jax._options import checked_options
from bptt_jax._trace.gradient import gradient_of
from bptt_jax._trace.trace import trace
from tests.scan.test_gradients import pairwise
from tests.support import comparison
from tests.support.steps import normal

LENGTH = 12
PLANS = {
    "none": None,
    "steps": Steps(12),
    "remat": Repeat(3, Remat(Steps(4))),
    "chain": Chain((Repeat(2, Remat(Steps(5))), Steps(2))),
    "deep": Repeat(2, Remat(Repeat(2, Remat(Repeat(3, Remat(Steps(1))))))),
}
LIMITS = (*PLANS, "budget")
LOWERINGS = (None, "sweep", "nested")
FORMS = ("eager", "jit", "gradient of vmap", "vmap of gradient", "vmap of jit of gradient")


def logged(w, h, x):
    """Metrics of the carry, of x and of the weight; each infinitely steep where the first of them are zero."""
    metrics = {
        "norm": jnp.sqrt(jnp.sum(h**2)),
        "log": jnp.log(jnp.abs(h)),
        "of w": jnp.sqrt(jnp.sum((h @ w) ** 2)),
        "of x": jnp.log(jnp.abs(x)),
        "of x and w": jnp.sqrt(jnp.sum((x @ w) ** 2)),
    }
    return jnp.tanh(h @ w + x), {"h": h, **metrics}


def logged_loss(picked, scan, w, init, xs):
    """Of the last carry, or of an output; all others are not in the loss."""
    carry, ys = scan(functools.partial(logged, w), init, xs)
    return jnp.sum(jnp.sin(carry if picked == "carry" else ys[picked]))


def accumulated_loss(scan, w, init, xs):
    """Metrics in the carry, which the loss does not read at the end."""

    def step(carry, x):
        h, norms, logs = carry
        h, y = logged(w, h, x)
        return (h, norms + y["norm"] + y["of w"], logs * 0.9 + y["log"]), None

    return jnp.sum(jnp.sin(scan(step, (init, 0.0, jnp.zeros(3)), xs)[0][0]))


def masked_loss(mask, scan, w, init, xs):
    """Infinite derivatives in a branch that is not taken."""

    def step(h, x):
        safe = jnp.where(h == 0, 1.0, h)
        masked = {
            "where around a quotient": lambda: jnp.where(h == 0, 0.0, x / h),
            "where around a root": lambda: jnp.where(h > 0, jnp.sqrt(h), h),
            "where inside and around": lambda: jnp.where(h == 0, 0.0, x / safe),
            "where inside a root": lambda: jnp.where(h > 0, jnp.sqrt(jnp.where(h > 0, h, 0.0)), h),
            "cond": lambda: lax.cond(jnp.all(h == 0), jnp.sin, lambda h: x / h, h),
            "maximum": lambda: jnp.sqrt(jnp.maximum(h, 0.0)),
        }[mask]()
        return jnp.tanh(h @ w + x + 0.1 * jnp.tanh(masked)), h

    carry, ys = scan(step, init, xs)
    return jnp.sum(jnp.sin(carry)) + jnp.sum(ys[1:] ** 2)


def gradient(form, loss):
    """Of the weight, the first carry and xs; these begin with zeros. The loss takes a scan first."""
    w, init, xs = 0.5 * normal(0, 3, 3), jnp.zeros(3), normal(1, 2, LENGTH, 3).at[:, 0].set(0.0)
    of_one = jax.grad(loss, (0, 1, 2))
    axes = (None, None, 0)
    return {
        "eager": lambda: of_one(w, init, xs[0]),
        "jit": lambda: jax.jit(of_one)(w, init, xs[0]),
        "gradient of vmap": lambda: jax.jit(jax.grad(lambda *a: jax.vmap(loss, axes)(*a).sum(), (0, 1, 2)))(
            w, init, xs
        ),
        "vmap of gradient": lambda: jax.jit(jax.vmap(of_one, axes))(w, init, xs),
        "vmap of jit of gradient": lambda: jax.vmap(jax.jit(of_one), axes)(w, init, xs),
    }[form]()


def ours_and_theirs(loss, form, lowering, limit):
    """Gradients of a loss of (scan, weight, first carry, xs)."""

    def of(scan):
        return gradient(form, functools.partial(loss, scan))

    ours = functools.partial(bptt_jax.scan, lowering=lowering)
    if limit == "budget":
        ours = functools.partial(ours, verify=False)
        found, _ = comparison.in_smallest_budget(lambda n: of(functools.partial(ours, budget=n)))
    else:
        found = of(functools.partial(ours, plan=PLANS[limit]))
    return found, of(lax.scan)


def assert_same(ours, theirs):
    """With NaN in the same places."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(jnp.isnan(a), jnp.isnan(b))
    comparison.assert_same(*(jax.tree.map(jnp.nan_to_num, tree) for tree in (ours, theirs)), tolerance=1e-9)


@pytest.mark.parametrize("limit", LIMITS[:-1])
def test_the_nest_finds_all_that_it_has_kept(limit):
    """Whatever has a cotangent, the backward pass reads it again, and makes nothing of it anew."""

    w, init, xs = normal(0, 3, 3), normal(1, 3), normal(2, LENGTH, 3)
    plan = PLANS[limit] or Steps(LENGTH)
    traced = trace(functools.partial(logged, w), init, xs, None, False, 1, checked_options(plan=plan))
    asked = gradient_of(traced.call, traced.arguments)
    nest = Nested(traced.call, asked.wrt, plan, asked.active)
    n = len(traced.arguments)
    results = [i for i, active in enumerate((*asked.active.carry, *asked.active.y)) if active]
    known = Differentiated(nest.evaluate, asked.types, asked.wrt, results)
    kept = len(known.forward.out_avals) - len(asked.active.carry) - len(asked.active.y)
    for chosen in (results, results[:1], results[-1:]):
        pull = known.pull(tuple(i in chosen for i in results)).jaxpr
        read = read_by(pull.eqns, pull.outvars)
        used = [v in read for v in pull.invars[n : n + kept]]
        assert all(used) if chosen == results else any(used)


def is_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("picked", "form", "lowering", "limit"), pairwise(("carry", "h"), FORMS, LOWERINGS, LIMITS))
def test_outputs_that_are_not_in_the_loss(picked, form, lowering, limit):
    ours, theirs = ours_and_theirs(functools.partial(logged_loss, picked), form, lowering, limit)
    assert is_finite(theirs)
    assert_same(ours, theirs)


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("form", "lowering", "limit"), pairwise(FORMS[1:4], LOWERINGS, LIMITS))
def test_metrics_in_a_carry_that_are_not_in_the_loss(form, lowering, limit):
    """`jax.lax.scan` may give NaN here, which need not be given."""
    ours, theirs = ours_and_theirs(accumulated_loss, form, lowering, limit)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert jnp.all(jnp.isfinite(a) | ~jnp.isfinite(b))
        comparison.assert_same(*(jnp.where(jnp.isfinite(b), leaf, 0.0) for leaf in (a, b)), tolerance=1e-9)


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    ("picked", "lowering", "limit"),
    pairwise(("norm", "log", "of w", "of x", "of x and w"), LOWERINGS[1:], LIMITS),
)
def test_outputs_that_are_in_the_loss(picked, lowering, limit):
    """Then there is NaN, or an infinite number, and where it is in `jax.lax.scan`."""
    ours, theirs = ours_and_theirs(functools.partial(logged_loss, picked), "jit", lowering, limit)
    assert not is_finite(theirs)
    assert_same(ours, theirs)


MASKS = {
    "where around a quotient": False,
    "where around a root": False,
    "where inside and around": True,
    "where inside a root": True,
    "cond": True,
    "maximum": False,
}


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("mask", "form", "lowering", "limit"), pairwise(tuple(MASKS), FORMS[1:4], LOWERINGS, LIMITS))
def test_branches_that_are_not_taken(mask, form, lowering, limit):
    ours, theirs = ours_and_theirs(functools.partial(masked_loss, mask), form, lowering, limit)
    if mask != "cond" or form == "jit":  # under vmap both branches of a `cond` on the carry run
        assert is_finite(theirs) == MASKS[mask]
    assert_same(ours, theirs)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("limit", ["none", "chain"])
@pytest.mark.parametrize("lowering", [None, "nested"])
@pytest.mark.parametrize("picked", ["carry", "h"])
def test_second_derivatives(picked, lowering, limit):
    """Of outputs that are not in the loss, forward over reverse and reverse over reverse."""

    def second(scan, w, init, xs):
        of_weight = jax.grad(lambda w: logged_loss(picked, scan, w, init, xs))
        return jnp.vdot(of_weight(w), jnp.cos(w)) + jnp.vdot(jax.jvp(of_weight, (w,), (jnp.sin(w),))[1], w)

    ours, theirs = ours_and_theirs(second, "jit", lowering, limit)
    assert is_finite(theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("reads", ["carry", "ys"])
def test_a_product_for_an_output_alone_is_not_merged_with_one_for_the_carry(monkeypatch, reads):
    """Both read the carry. Merged, the one without a cotangent would give zero times a weight that is infinite."""
    monkeypatch.setattr(Machine, "merging_pays", lambda machine, flops, rows: True)
    weights = normal(0, 4, 4) / 2, (normal(1, 4, 4) / 2).at[0, 0].set(jnp.inf)

    def step(weights, h, x):
        return jnp.tanh(h @ weights[0] + x), jnp.tanh(h @ weights[1])

    def loss(scan, weights):
        carry, ys = scan(functools.partial(step, weights), normal(2, 3, 4), normal(3, 9, 3, 4))
        return jnp.sum(jnp.sin(carry if reads == "carry" else ys))

    ours, theirs = (jax.grad(functools.partial(loss, scan))(weights) for scan in (bptt_jax.scan, lax.scan))
    comparison.assert_same(ours, theirs, tolerance=1e-12)
    assert reads == "ys" or not any(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(ours))
