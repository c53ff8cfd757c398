"""The compiled program evaluates the step as often and in the order that the plan says, and traces it a fixed number
of times."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from bptt_jax.plans import Advance, Backward, Record, length, notation, simulate
from bptt_jax.plans._profile import SweepProfile

PLANS = [
    Steps(12),
    Repeat(3, Remat(Steps(4))),
    Repeat(12, Remat(Steps(1))),
    Repeat(2, Remat(Repeat(3, Remat(Steps(2))))),
    Repeat(2, Remat(Repeat(2, Remat(Repeat(3, Remat(Steps(1))))))),
    Chain((Repeat(3, Remat(Steps(3))), Steps(4))),
    Chain((Repeat(2, Remat(Chain((Repeat(2, Remat(Steps(2))), Steps(1))))), Repeat(2, Remat(Steps(2))), Steps(3))),
]


def evaluations(plan, lowering):
    """The steps that a plan evaluates, in order, by its simulated events."""
    return [
        i
        for event in simulate(plan, lowering)
        if isinstance(event, Advance | Record)
        for i in range(event.start, event.stop)
    ]


@pytest.mark.parametrize("lowering", [None, "nested"])
@pytest.mark.parametrize("plan", PLANS, ids=notation)
def test_order_of_evaluations(plan, lowering):
    seen = []

    def step(carry, x):
        h, i = carry
        # Unordered: the order of execution is what is asked for; ordered callbacks would enforce one.
        jax.debug.callback(lambda i: seen.append(int(i)), i, ordered=False)
        return (jnp.sin(h) + x, i + 1), None

    def loss(xs):
        init = (jnp.zeros(3), jnp.array(0))
        return bptt_jax.scan(step, init, xs, plan=plan, lowering=lowering)[0][0].sum()

    with bptt_jax.show_recomputation():
        jax.block_until_ready(jax.jit(jax.grad(loss))(jnp.ones((length(plan), 3))))
    jax.effects_barrier()
    assert seen == evaluations(plan, lowering or "sweep")


@pytest.mark.parametrize("lowering", ["sweep", "nested"])
@pytest.mark.parametrize("plan", PLANS, ids=notation)
def test_simulation_is_consistent(plan, lowering):
    """Evaluations as `cost` counts them; every step recorded once and taken back once, from the last to the first."""
    events = list(simulate(plan, lowering))
    plain = bptt_jax.StepProfile(carry_bytes=1, residual_bytes=1)
    profile = plain if lowering == "nested" else dataclasses.replace(plain, sweep=SweepProfile(1, 1))
    assert profile.lowering == lowering
    assert len(evaluations(plan, lowering)) == bptt_jax.cost(plan, profile).forward_steps
    recorded = Counter(i for e in events if isinstance(e, Record) for i in range(e.start, e.stop))
    assert recorded == Counter(range(length(plan)))
    backward = [i for e in events if isinstance(e, Backward) for i in reversed(range(e.start, e.stop))]
    assert backward == list(reversed(range(length(plan))))


def counted(step):
    calls = []

    @functools.wraps(step)
    def wrapper(carry, x):
        calls.append(1)
        return step(carry, x)

    return wrapper, calls


@pytest.mark.one_in(7)
@pytest.mark.parametrize("lowering", [None, "nested"])
@pytest.mark.parametrize("budget", [None, "60%", "20%"])
def test_number_of_traces_does_not_depend_on_the_length(budget, lowering):
    numbers = set()
    for steps in (100, 1_000, 100_000):
        step, calls = counted(lambda carry, x: (jnp.sin(carry) * x, None))

        def loss(init, xs, step=step):
            return bptt_jax.scan(step, init, xs, budget=budget, lowering=lowering)[0].sum()

        shapes = jax.ShapeDtypeStruct((100,), float), jax.ShapeDtypeStruct((steps,), float)
        jax.jit(jax.grad(loss)).lower(*shapes)
        numbers.add(len(calls))
    assert numbers == {1}


def test_number_of_traces_does_not_depend_on_the_plan():
    numbers = set()
    for plan in PLANS:
        step, calls = counted(lambda carry, x: (jnp.sin(carry) * x, None))
        run = functools.partial(bptt_jax.scan, step, plan=plan)
        jax.jit(jax.grad(lambda init, xs, run=run: run(init, xs)[0])).lower(1.0, jnp.ones(length(plan)))
        numbers.add(len(calls))
    assert numbers == {1}


@pytest.mark.parametrize("lowering", [None, "nested"])
def test_calls_outside_jit_compile_once(lowering):
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def step(carry, x):
        return jnp.sin(carry) * x, carry

    def loss(init, xs):
        return jnp.sum(bptt_jax.scan(step, init, xs, budget="80%", lowering=lowering)[0])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first, second = jnp.ones((100, 64)), jnp.zeros((100, 64))
        for call in (loss, jax.grad(loss)):
            call(jnp.ones(64), first)
            before = len(compiled)
            assert before > 0
            call(jnp.zeros(64), second)
            assert len(compiled) == before
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
