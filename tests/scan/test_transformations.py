"""Every transformation of JAX, applied to a scan, gives what it gives for `jax.lax.scan`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from tests.support import comparison
from tests.support.transformations import ROWS
from tests.support.transformations.table import LENGTH, Model, step_named

PLAN = Chain((Repeat(2, Remat(Steps(5))), Steps(2)))
WAYS = [(lowering, limit) for limit in ("none", "plan", "budget") for lowering in (None, "nested")]


def planned(*arguments, **options):
    """By a plan; scans around that are shorter have one of their own."""
    length = options.get("length") or jax.tree.leaves(arguments[2])[0].shape[0]
    plan = PLAN if length == LENGTH else Repeat(length, Remat(Steps(1)))
    return bptt_jax.scan(*arguments, **options, plan=plan)


def result_of(row, scan, name):
    model = Model(scan, step_named(name))
    floats, _ = comparison.split(model.case, LENGTH)
    run = functools.partial(row.run, model)
    return (jax.jit(run) if row.jitted else run)(floats)


def in_a_way(result, lowering, limit):
    """`result` of a scan without a budget, by a plan, or with the smallest budget that all gradients in it fit."""
    if limit == "budget":
        ours = functools.partial(bptt_jax.scan, lowering=lowering, verify=False)
        return comparison.in_smallest_budget(lambda budget: result(functools.partial(ours, budget=budget)))[0]
    return result(functools.partial(planned if limit == "plan" else bptt_jax.scan, lowering=lowering))


@functools.cache
def reference(row, name):
    return result_of(row, lax.scan, name)


def rows():
    """Each row in each way; the steps take turns."""
    return [
        (row, row.steps[(i + j) % len(row.steps)], lowering, limit)
        for i, row in enumerate(ROWS)
        for j, (lowering, limit) in enumerate(WAYS)
    ]


def checkpointed(f, init, xs=None, length=None, **options):
    return lax.scan(jax.checkpoint(f), init, xs, length, **options)


@functools.cache
def depends_on_checkpoints(row, name):
    """Whether a rule that is not the derivative of its function is applied elsewhere because of `jax.checkpoint`.

    Second derivatives are then JAX's own business: under JAX_REMAT3=1 they have other values, or raise.
    """
    try:
        comparison.assert_same(result_of(row, checkpointed, name), reference(row, name), tolerance=1e-9)
    except (AssertionError, TypeError):
        return True
    return False


@pytest.mark.one_in(37)
@pytest.mark.parametrize(("row", "name", "lowering", "limit"), rows(), ids=str)
def test_equals_lax_scan(row, name, lowering, limit):
    if name == "own_rule" and limit != "none" and depends_on_checkpoints(row, name):
        pytest.skip("jax.checkpoint has another second derivative than jax.lax.scan here")
    ours = in_a_way(lambda scan: result_of(row, scan, name), lowering, limit)
    theirs = reference(row, name)
    comparison.assert_same(ours, theirs, tolerance=1e-9)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(theirs) if comparison.is_float(leaf))


REVERSE_OF_A_LOOP = (
    "value_and_gradient_with_results",
    "gradient_of_vmap",
    "vmap_of_gradient",
    "jacrev",
    "inside_itself",
)


@pytest.mark.one_in(11)
@pytest.mark.parametrize(
    ("row", "lowering", "limit"),
    [(row, *way) for row in ROWS if str(row) in REVERSE_OF_A_LOOP for way in WAYS],
    ids=str,
)
def test_what_has_no_reverse_mode_is_refused_in_the_words_of_jax(row, lowering, limit):
    """A step with a `while_loop`: it can be evaluated and has forward mode, which rows above show."""
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work") as theirs:
        result_of(row, lax.scan, "inner_while")
    with pytest.raises(theirs.type) as ours:
        in_a_way(lambda scan: result_of(row, scan, "inner_while"), lowering, limit)
    assert type(ours.value) is theirs.type
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


@pytest.mark.parametrize("plan", [None, PLAN], ids=["none", "plan"])
@pytest.mark.parametrize("lowering", [None, "nested"])
def test_debug_nans_finds_what_is_not_a_number(lowering, plan):
    """In the gradient alone, of a root at zero in a branch that is not taken."""

    def loss(init):
        def step(h, x):
            return jnp.tanh(jnp.where(h > 0, jnp.sqrt(h), h) + x), None

        return bptt_jax.scan(step, init, jnp.ones(LENGTH), plan=plan, lowering=lowering)[0]

    with jax.debug_nans(True):
        assert jnp.isfinite(loss(0.0))
        for gradient, init in (
            (jax.grad(loss), 0.0),
            (jax.jit(jax.grad(loss)), 0.0),
            (jax.vmap(jax.grad(loss)), jnp.zeros(2)),
        ):
            with pytest.raises(FloatingPointError, match="nan"):
                gradient(init)


@pytest.mark.one_in(11)
@pytest.mark.parametrize(("lowering", "limit"), WAYS)
def test_spmd_axis_name_reaches_the_step(lowering, limit):
    """A sharding of one example's carry is one of the batch's, in each pass."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), (AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    w, xs = 0.3 * jnp.eye(3), jnp.ones((2, LENGTH, 4, 3))

    def constraints(scan):
        def loss(w, xs):
            def step(h, x):
                return lax.with_sharding_constraint(jnp.tanh(h @ w + x), sharding), None

            return jnp.sum(scan(step, jnp.ones((4, 3)), xs)[0])

        mapped = functools.partial(jax.vmap, in_axes=(None, 0), spmd_axis_name="data")
        for gradient in (
            jax.grad(lambda w, xs: mapped(loss)(w, xs).sum()),
            mapped(jax.grad(loss)),
            mapped(jax.jit(jax.grad(loss))),
        ):
            text = jax.jit(gradient).lower(w, xs).as_text()
            yield set(re.findall(r"sdy.sharding_constraint[^<]*<@mesh, (\[[^]]*\])", text))

    found = in_a_way(lambda scan: list(constraints(scan)), lowering, limit)
    theirs = list(constraints(lax.scan))
    assert found == theirs
    assert all(len(each) == 1 and '"data"' in min(each) for each in theirs)
