"""Calls of `scan`: its options, and inputs and results of the kinds that `jax.lax.scan` takes and gives."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bptt_jax
from bptt_jax import Remat, Repeat, Steps
from tests.support import comparison
from tests.support.steps import case_named, normal


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


@pytest.mark.parametrize(("unroll", "together"), [(1, 1), (3, 3), (True, 6), (0, 6), (False, 1)])
def test_unroll_is_heeded(unroll, together):
    """By as many steps in a row in the compiled loops as in those of `jax.lax.scan`, forward and backward."""

    def evaluations(scan):
        def last(init):
            return scan(lambda c, x: (jnp.sin(c) + x, None), init, jnp.ones(6), unroll=unroll)[0]

        forward, backward = (jax.jit(f).lower(0.0).compile().as_text() for f in (last, jax.grad(last)))
        return forward.count(" sine("), backward.count(" cosine(")

    assert evaluations(lax.scan) == (together, together)
    for lowering in (None, "nested"):
        assert evaluations(functools.partial(bptt_jax.scan, lowering=lowering)) == (together, together)


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
    budget = comparison.smallest_budget(case, 97)
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


@pytest.mark.parametrize("lowering", [None, "nested"])
def test_what_a_step_does_not_read_costs_nothing(lowering):
    """Weights of other layers, an output that is dropped, a part of the carry that is only handed on."""
    params = {"cell": 0.3 * normal(0, 8, 8), "logits": normal(1, 8, 512), "labels": jnp.arange(512)}
    init, xs = (normal(2, 8), normal(3, 64, 64)), normal(4, 200, 8)

    def needs(params, carry, x):
        return jnp.tanh(params["cell"] @ carry + x), None

    def does_more(params, carry, x):
        jnp.argmax(carry[0] @ params["logits"])
        return (needs(params, carry[0], x)[0], carry[1]), None

    options = {"budget": "30%", "lowering": lowering}
    less, more = (
        bptt_jax.explain(functools.partial(step, params), start, xs, **options)
        for step, start in ((needs, init[0]), (does_more, init))
    )
    assert (more.profile, more.plan, more.measured_bytes) == (less.profile, less.plan, less.measured_bytes)

    run = bptt_jax.checkpointed(does_more, params=True, **options)

    def loss(scan):
        def of(weights, init, xs):
            carry, _ = scan(weights | {"labels": params["labels"]}, init, xs)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in carry)

        return of

    arguments = ({name: params[name] for name in ("cell", "logits")}, init, xs)
    ours, theirs = loss(run), loss(lambda params, *a: lax.scan(functools.partial(does_more, params), *a))
    gradients = [jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*arguments) for f in (ours, theirs)]
    comparison.assert_same(*gradients, tolerance=1e-12)
    tangents = jax.tree.map(jnp.cos, arguments)
    comparison.assert_same(*(jax.jvp(f, arguments, tangents) for f in (ours, theirs)), tolerance=1e-12)
