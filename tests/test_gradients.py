"""Values and derivatives equal those of `jax.lax.scan`, for every kind of plan, step, length and transformation."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from bptt_jax.errors import BudgetError
from bptt_jax.plans import length as length_of
from tests import comparison
from tests.slow import one_in
from tests.steps import Case, make_cases, normal

LENGTHS = (0, 1, 2, 7, 97, 100, 1000, 1009)
BUDGETS = ("smallest", "between", "everything", None)
STEPS = ("bare", "outputs", "mixed", "no_inputs")
TRANSFORMS = (
    ("reverse", comparison.value_and_grad),
    ("any", comparison.value_and_grad),
    ("reverse", comparison.eager_grad),
    ("reverse", comparison.vmapped_grad),
    ("any", comparison.vmapped_grad),
    ("any", comparison.jvp),
    ("reverse", comparison.forward_over_reverse),
    ("any", comparison.forward_over_reverse),
    ("reverse", comparison.reverse_over_reverse),
    ("any", comparison.reverse_over_reverse),
)
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
    while needed:
        best = max(rows, key=lambda row: len(covers[row] & needed))
        needed -= covers[best]
        yield tuple(column[at] for column, at in zip(columns, best, strict=True))


def case_named(name, dtype):
    return next(case for case in make_cases(dtype) if case.name == name)


def smallest_budget(case: Case, length: int, differentiation: str) -> int:
    """The smallest budget that the error for a budget of one byte names; 1 if that is enough."""
    scan = functools.partial(bptt_jax.scan, budget=1, differentiation=differentiation)
    loss, floats = comparison.make_loss(case, length, scan)
    try:
        jax.eval_shape(jax.grad(loss, has_aux=True), floats)
    except BudgetError as error:
        return error.smallest_bytes
    return 1


def budget_in_bytes(kind, case, length, differentiation="reverse"):
    if kind is None or length == 0:
        return None if kind is None else 1
    smallest = smallest_budget(case, length, differentiation)
    step = functools.partial(case.step, case.params)
    xs = case.xs(length)
    x = None if xs is None else jax.tree.map(lambda leaf: leaf[0], xs)
    profile = bptt_jax.profile(step, case.init, x, differentiation=differentiation)
    everything = max(bptt_jax.cost(Steps(length), profile).peak_bytes, smallest)
    return {"smallest": smallest, "between": (smallest + everything) // 2, "everything": max(everything, 1)}[kind]


@pytest.mark.parametrize(
    ("length", "budget", "name", "transform", "reverse"),
    one_in(2, pairwise(LENGTHS, BUDGETS, STEPS, TRANSFORMS, DIRECTIONS)),
)
def test_equals_lax_scan(length, budget, name, transform, reverse):
    differentiation, derivative = transform
    case = case_named(name, jnp.float64)
    ours = functools.partial(
        bptt_jax.scan,
        reverse=reverse,
        budget=budget_in_bytes(budget, case, length, differentiation),
        differentiation=differentiation,
    )
    theirs = functools.partial(lax.scan, reverse=reverse)
    results = [derivative(*comparison.make_loss(case, length, scan)) for scan in (ours, theirs)]
    comparison.assert_same(*results, tolerance=1e-12)


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
@given(
    plan=plans, reverse=st.booleans(), differentiation=st.sampled_from(("reverse", "any")), name=st.sampled_from(STEPS)
)
def test_any_plan_equals_lax_scan(plan, reverse, differentiation, name):
    """Also plans that no planner makes: bare Remats, empty segments, loops of one."""
    case = case_named(name, jnp.float64)
    ours = functools.partial(bptt_jax.scan, plan=plan, reverse=reverse, differentiation=differentiation)
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


@pytest.mark.parametrize("differentiation", ["reverse", "any"])
@pytest.mark.parametrize("batched", ["all", "first", "last"])
@pytest.mark.parametrize(("name", "plan"), [(name, p) for name in STEPS[1:3] for p in (Steps(6), REST, INLINED)])
def test_gradient_of_a_batch_equals_lax_scan(name, plan, batched, differentiation):
    """A batch as large as the length, so that an exchange of the two axes is not an error but a wrong number."""
    case = case_named(name, jnp.float64)
    ours = functools.partial(bptt_jax.scan, plan=plan, differentiation=differentiation)
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
    profile = bptt_jax.profile(step, init, xs[0], differentiation="any")
    budget = profile.store_all_bytes(60)
    report = bptt_jax.explain(step, init, xs, budget=budget)
    assert report.measured_bytes <= budget
    gradients = [
        jax.grad(lambda init, scan=scan: scan(step, init, xs)[0][0].sum())(init)
        for scan in (functools.partial(bptt_jax.scan, budget=budget), lax.scan)
    ]
    comparison.assert_same(*gradients, tolerance=1e-12)


def test_inputs_that_are_not_differentiated_need_no_derivative():
    """A loop without a reverse rule on them, as `jax.lax.scan` allows."""
    fixed = jnp.array(3.0)

    def step(carry, x):
        halved = lax.while_loop(lambda v: v > 0.5, lambda v: 0.5 * v, x * fixed)
        return jnp.sin(carry) + halved, halved

    xs = jnp.linspace(0.0, 5.0, 12)
    for plan in (Steps(12), Repeat(3, Remat(Steps(4)))):
        ours = jax.grad(lambda init, plan=plan: bptt_jax.scan(step, init, xs, plan=plan)[0])(0.3)
        comparison.assert_same(ours, jax.grad(lambda init: lax.scan(step, init, xs)[0])(0.3), tolerance=1e-12)


def test_unroll_is_heeded():
    def printed(scan, unroll):
        return str(jax.make_jaxpr(functools.partial(scan, lambda c, x: (jnp.sin(c) + x, None), unroll=unroll))(0.0, xs))

    xs = jnp.ones(6)
    for unroll, shown in ((1, "unroll=1"), (3, "unroll=3"), (True, "unroll=6"), (0, "unroll=0")):
        assert shown in printed(lax.scan, unroll)
        assert shown in printed(bptt_jax.scan, unroll)


@pytest.mark.parametrize("pair", [list, lambda pair: Pair(*pair), lambda pair: {"carry": pair[0], "ys": pair[1]}])
def test_the_pair_is_what_lax_scan_makes_of_it(pair):
    """JAX 0.10 takes pairs of any type and returns the same type; 0.12 takes tuples and lists only."""

    def step(carry, x):
        return pair((jnp.sin(carry) + x, carry))

    def outcome(scan):
        try:
            return scan(step, 0.0, jnp.ones(6)), None
        except TypeError as refusal:
            return None, str(refusal)

    (ours, our_refusal), (theirs, their_refusal) = outcome(bptt_jax.scan), outcome(lax.scan)
    assert our_refusal == their_refusal
    comparison.assert_same(ours, theirs, tolerance=0)


class Pair(NamedTuple):
    carry: Any
    ys: Any


def test_unroll_and_decorator():
    case = case_named("outputs", jnp.float64)
    budget = budget_in_bytes("smallest", case, 97)
    for unroll in (1, 3, True, 0):

        @bptt_jax.checkpointed(budget=budget, params=True, unroll=unroll)
        def run(params, carry, x):
            """Its docstring."""
            return case.step(params, carry, x)

        def ours(params, init, xs, run=run):
            return run(params, init, xs, reverse=True)

        def theirs(params, init, xs):
            return lax.scan(lambda carry, x: case.step(params, carry, x), init, xs, reverse=True)

        arguments = (case.params, case.init, case.xs(97))
        results = [
            jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a)[1]["y"])), argnums=(0, 1, 2)))(*arguments)
            for f in (ours, theirs)
        ]
        comparison.assert_same(*results, tolerance=1e-12)
    assert run.__doc__ == "Its docstring."
    assert run.__name__ == "run"


def test_gradient_with_respect_to_one_input_after_another():
    """One traced program, differentiated for different inputs: JAX keeps the rules of the first."""
    w, xs = 0.3 * normal(0, 3, 3, dtype=jnp.float64), normal(1, 400, 3, dtype=jnp.float64)

    def loss_with(scan):
        def step(w, carry, x):
            carry = jnp.tanh(w @ carry + x)
            return carry, carry

        @jax.jit
        def loss(w, init, xs):
            carry, ys = scan(lambda c, x: step(w, c, x), init, xs)
            return carry.sum(), jnp.sin(ys).sum()

        return loss

    ours, theirs = loss_with(functools.partial(bptt_jax.scan, budget="60%")), loss_with(lax.scan)
    for argnums in (0, (0, 1, 2), 2, (1, 2), 0):
        for picked in ((0,), (0, 1), (1,)):
            gradients = [
                jax.grad(lambda *a, f=f, picked=picked: sum(f(*a)[i] for i in picked), argnums)(w, xs[0], xs)
                for f in (ours, theirs)
            ]
            comparison.assert_same(*gradients, tolerance=1e-12)


def test_weakly_typed_carry_is_promoted_as_lax_scan_does():
    xs = jnp.linspace(0.0, 1.0, 30, dtype=jnp.float32)
    jax.config.update("jax_numpy_dtype_promotion", "standard")

    def step(carry, x):
        return carry * 0.5 + x, carry

    def swapped(carry, x):
        return (carry[1], carry[0] * 1.5), carry[0]

    calls = [(step, 0), (step, 0.0), (step, jnp.float32(0)), (swapped, (1, 2.0)), (swapped, (1.0, jnp.float32(2)))]
    for body, init in calls:
        ours, theirs = (scan(body, init, xs) for scan in (bptt_jax.scan, lax.scan))
        comparison.assert_same(ours, theirs, tolerance=0)
        weak = [[leaf.weak_type for leaf in jax.tree.leaves(result)] for result in (ours, theirs)]
        assert weak[0] == weak[1]


def test_numpy_inputs():
    xs = np.linspace(0.0, 1.0, 30)
    ours, theirs = (scan(lambda c, x: (jnp.sin(c) + x, c), np.zeros(()), xs) for scan in (bptt_jax.scan, lax.scan))
    comparison.assert_same(ours, theirs, tolerance=0)
