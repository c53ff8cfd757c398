"""Values and derivatives equal those of `jax.lax.scan`, for every kind of plan, step, length and transformation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from bptt_jax.plans import length as length_of
from tests.support import comparison
from tests.support.steps import Case, case_named, normal

LENGTHS = (0, 1, 2, 7, 97, 100, 1000, 1009)
BUDGETS = ("smallest", "between", "everything", None)
STEPS = ("bare", "outputs", "mixed", "no_inputs")
TRANSFORMS = tuple(itertools.product((None, "nested"), comparison.DERIVATIVES))
DIRECTIONS = (False, True)
REST = Chain((Repeat(2, Remat(Steps(2))), Steps(2)))
INLINED = Chain((Repeat(2, Remat(Repeat(2, Remat(Steps(1))))), Repeat(2, Steps(1))))


def pairwise(*columns):
    """Rows such that each pair of values of two columns stands in one: greedy, always the same."""
    needed = {
        (i, a, j, b)
        for (i, left), (j, right) in itertools.combinations(enumerate(columns), 2)
        for a in range(len(left))
        for b in range(len(right))
    }
    rows = list(itertools.product(*(range(len(c)) for c in columns)))
    covers = {row: {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)} for row in rows}
    taken = []
    while needed:
        taken.append(max(rows, key=lambda row: len(covers[row] & needed)))
        needed -= covers[taken[-1]]
    return [tuple(column[at] for column, at in zip(columns, row, strict=True)) for row in taken]


def budget_in_bytes(kind, case, length, lowering=None, derivative=comparison.value_and_grad):
    if kind is None or length == 0:
        return None if kind is None else 1
    smallest = comparison.smallest_budget(case, length, derivative, lowering=lowering)
    step = functools.partial(case.step, case.params)
    xs = case.xs(length)
    x = None if xs is None else jax.tree.map(lambda leaf: leaf[0], xs)
    profile = bptt_jax.profile(step, case.init, x, lowering=lowering)
    everything = max(bptt_jax.cost(Steps(length), profile).peak_bytes, smallest)
    return {"smallest": smallest, "between": (smallest + everything) // 2, "everything": max(everything, 1)}[kind]


@pytest.mark.one_in(15)
@pytest.mark.parametrize(
    ("length", "budget", "name", "transform", "reverse"),
    pairwise(LENGTHS, BUDGETS, STEPS, TRANSFORMS, DIRECTIONS),
)
def test_equals_lax_scan(length, budget, name, transform, reverse):
    lowering, derivative = transform
    case = case_named(name, jnp.float64)
    ours = functools.partial(
        bptt_jax.scan,
        reverse=reverse,
        budget=budget_in_bytes(budget, case, length, lowering, derivative),
        lowering=lowering,
    )
    theirs = functools.partial(lax.scan, reverse=reverse)
    results = [derivative(*comparison.make_loss(case, length, scan)) for scan in (ours, theirs)]
    comparison.assert_same(*results, tolerance=1e-12)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", STEPS)
def test_equals_lax_scan_in_single_precision(name):
    case = case_named(name, jnp.float32)
    ours = functools.partial(bptt_jax.scan, budget=budget_in_bytes("smallest", case, 100))
    results = [comparison.value_and_grad(*comparison.make_loss(case, 100, scan)) for scan in (ours, lax.scan)]
    comparison.assert_same(*results, tolerance=1e-5)


plans = st.recursive(
    st.integers(0, 4).map(Steps),
    lambda inner: st.one_of(
        st.builds(Remat, inner),
        st.builds(Repeat, st.integers(1, 3), inner),
        st.lists(inner, min_size=1, max_size=3).map(tuple).map(Chain),
    ),
    max_leaves=5,
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(plan=plans, reverse=st.booleans(), lowering=st.sampled_from((None, "nested")), name=st.sampled_from(STEPS))
def test_any_plan_equals_lax_scan(plan, reverse, lowering, name):
    """Also plans that no planner makes: bare Remats, empty segments, loops of one."""
    case = case_named(name, jnp.float64)
    ours = functools.partial(bptt_jax.scan, plan=plan, reverse=reverse, lowering=lowering)
    theirs = functools.partial(lax.scan, reverse=reverse)
    loss, floats = comparison.make_loss(case, length_of(plan), ours)
    reference, _ = comparison.make_loss(case, length_of(plan), theirs)
    comparison.assert_same(
        comparison.value_and_grad(loss, floats), comparison.value_and_grad(reference, floats), tolerance=1e-12
    )


leaves = st.sampled_from(("f32", "f64", "i8", "bool", "key", "empty", "complex"))


def make_leaf(kind, seed, batch=()):
    key = jax.random.key(seed)
    return {
        "f32": lambda: jax.random.normal(key, (*batch, 2), jnp.float32),
        "f64": lambda: jax.random.normal(key, (*batch, 1, 3), jnp.float64),
        "i8": lambda: jax.random.randint(key, (*batch,), 0, 5).astype(jnp.int8),
        "bool": lambda: jax.random.bernoulli(key, 0.5, (*batch, 2)),
        "key": lambda: jax.random.split(key, batch) if batch else key,
        "empty": lambda: jnp.zeros((*batch, 0, 2)),
        "complex": lambda: jax.random.normal(key, (*batch, 2), jnp.complex128),
    }[kind]()


def rotate(leaf, other):
    """A new value of the type of `leaf` that depends on `other`, a real scalar."""
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.sin(leaf) + (0.3 * other).astype(leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(leaf, 1)
    return ~leaf


def sum_of_floats(tree):
    return sum(map(comparison.real_sum, filter(comparison.is_float, jax.tree.leaves(tree))), jnp.float64(0))


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    carry_kinds=st.lists(leaves, min_size=1, max_size=3),
    x_kinds=st.lists(leaves, max_size=2),
    length=st.integers(0, 23),
    share=st.floats(0, 1),
    reverse=st.booleans(),
)
def test_any_pytree_length_and_budget(carry_kinds, x_kinds, length, share, reverse):
    init = {str(i): make_leaf(kind, i) for i, kind in enumerate(carry_kinds)}
    xs = tuple(make_leaf(kind, 10 + i, (length,)) for i, kind in enumerate(x_kinds))

    def step(params, carry, x):
        drive = jnp.sin(sum_of_floats((params, x, carry)))
        carry = jax.tree.map(lambda leaf: rotate(leaf, drive), carry)
        return carry, (carry, drive)

    case = Case("drawn", step, {"p": normal(3, 2, dtype=jnp.float64)}, init, lambda n: xs)
    smallest, everything = (budget_in_bytes(kind, case, length) for kind in ("smallest", "everything"))
    budget = smallest + int(share * max(everything - smallest, 0))
    ours = functools.partial(bptt_jax.scan, budget=budget, reverse=reverse)
    results = [
        comparison.value_and_grad(*comparison.make_loss(case, length, scan))
        for scan in (ours, functools.partial(lax.scan, reverse=reverse))
    ]
    comparison.assert_same(*results, tolerance=1e-12)


@pytest.mark.one_in(11)
@pytest.mark.parametrize("lowering", [None, "nested"])
@pytest.mark.parametrize("batched", ["all", "first", "last"])
@pytest.mark.parametrize(("name", "plan"), [(name, p) for name in STEPS[1:3] for p in (Steps(6), REST, INLINED)])
def test_gradient_of_a_batch_equals_lax_scan(name, plan, batched, lowering):
    """A batch as large as the length, so that an exchange of the two axes is not an error but a wrong number."""
    case = case_named(name, jnp.float64)
    ours = functools.partial(bptt_jax.scan, plan=plan, lowering=lowering)
    results = []
    for scan in (ours, lax.scan):
        loss, floats = comparison.make_loss(case, 6, scan)
        is_batched = {"all": lambda i: True, "first": lambda i: i == 0, "last": lambda i: i == len(floats) - 1}[batched]  # noqa: B023
        results.append(comparison.grad_of_vmap(loss, floats, is_batched, size=6))
    comparison.assert_same(*results, tolerance=1e-12)


def test_results_that_a_batch_shares():
    """Outputs that do not depend on what is batched, by the default options and no budget."""
    xs, init = jnp.linspace(0.1, 1.0, 8), jnp.linspace(-1.0, 1.0, 8)

    def loss_with(scan):
        def model(carry, xs):
            return scan(lambda c, x: ((jnp.sin(c[0] + x), 0.9 * c[1]), (c[0], x**2, c[1])), (carry, 1.0), xs)

        def loss(init, xs):
            weights = jnp.arange(64.0).reshape(8, 8)
            (carry, rate), ys = jax.vmap(model, in_axes=(0, None))(init, xs)
            return sum(jnp.sum(jnp.sin(leaf) * weights) for leaf in ys) + jnp.sum(carry * rate)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    comparison.assert_same(loss_with(bptt_jax.scan)(init, xs), loss_with(lax.scan)(init, xs), tolerance=1e-12)


def test_a_step_that_keeps_nothing_runs_in_what_lax_scan_takes():
    """A linear step with a large carry: the sweep's loops would hold more than the scan's."""

    def step(carry, x):
        u, before = carry
        return (2 * u - before + 0.1 * (jnp.roll(u, 1) - u) + x, u), None

    init = (normal(0, 4096, dtype=jnp.float64), normal(1, 4096, dtype=jnp.float64))
    xs = normal(2, 60, dtype=jnp.float64)
    profile = bptt_jax.profile(step, init, xs[0], lowering="nested")
    # The last carry and its cotangent are counted as well, because a loss around the scan holds them.
    budget = profile.store_all_bytes(60) + 2 * profile.carry_bytes
    report = bptt_jax.explain(step, init, xs, budget=budget)
    assert report.measured_bytes <= budget
    gradients = [
        jax.grad(lambda init, scan=scan: scan(step, init, xs)[0][0].sum())(init)
        for scan in (functools.partial(bptt_jax.scan, budget=budget), lax.scan)
    ]
    comparison.assert_same(*gradients, tolerance=1e-12)
