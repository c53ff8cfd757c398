"""`host_budget` beside `budget`: on CPU both are of one memory, elsewhere plans use two; all doors hand it on."""

import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bptt_jax
from bptt_jax import _pipeline
from bptt_jax._caches import forget_everything
from bptt_jax._measure.measure import measure
from bptt_jax._verify.check import Measured
from bptt_jax.errors import BudgetError, BudgetWarning
from bptt_jax.plans._memories import uses_host
from tests.support.targets import planning_for

INIT, XS = jnp.zeros(512), jnp.ones((400, 512))
KIB = 1024


def step(carry, x):
    return jnp.sin(carry) * jnp.cos(x) + carry, None


def report(**options):
    return bptt_jax.explain(step, INIT, XS, **options)


def test_on_a_cpu_the_budget_is_the_sum():
    together = report(budget=200 * KIB, host_budget=400 * KIB)
    assert together.plan == report(budget=600 * KIB).plan
    assert not uses_host(together.plan)
    assert (together.budget_bytes, together.host_budget_bytes, together.host_bytes) == (200 * KIB, 400 * KIB, 0)
    assert 200 * KIB < together.measured_bytes <= 600 * KIB
    assert "budget on the host            400 KiB  (409,600 bytes)  added to the budget, because" in str(together)
    assert "OVER" not in str(together)


def test_errors_and_warnings_on_a_cpu_say_so():
    together = "budget=10 and host_budget=10 together, because a CPU has one memory, which is 20 bytes"
    with pytest.raises(BudgetError, match=together) as info:
        report(budget=10, host_budget=10)
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)
    report(budget=info.value.smallest_bytes - 10, host_budget=10)
    with pytest.warns(BudgetWarning, match="budget='0.01%' and host_budget='0.01%' together, because a CPU"):
        report(budget="0.01%", host_budget="0.01%")


def test_the_summary_is_of_both():
    together = report(budget=200 * KIB, host_budget=400 * KIB)
    assert " of a budget of 600 KiB, plan" in together.summary


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"host_budget": "1MiB"}, ValueError, "host_budget='1MiB' needs a budget: without one, everything is kept"),
        ({"host_budget": "1MiB", "plan": "400"}, ValueError, "host_budget='1MiB' needs a budget"),
        ({"budget": "1MiB", "host_budget": "auto"}, ValueError, 'host_budget="auto" is not known: JAX does not tell'),
        ({"budget": "1MiB", "host_budget": "1 GiBi"}, ValueError, "host_budget='1 GiBi' has the unknown unit"),
        ({"budget": "1MiB", "host_budget": True}, TypeError, "host_budget=True of type bool is not a budget"),
        (
            {"budget": "1MiB", "host_budget": -1},
            ValueError,
            "host_budget=-1 is -1 bytes, but a budget must be positive",
        ),
    ],
)
def test_malformed_options(options, error, message):
    for call in (lambda: bptt_jax.scan(step, INIT, XS, **options), lambda: bptt_jax.checkpointed(step, **options)):
        with pytest.raises(error, match=re.escape(message)):
            call()
    with pytest.raises(error, match=re.escape(message)):
        bptt_jax.linen.RNN(nn.GRUCell(4), **options)


def plans_of(function, *arguments):
    """The plans of the scans that a function differentiates, made as for a GPU."""
    with planning_for("gpu"):
        return [report.plan for report in bptt_jax.explain_calls(jax.grad(function), *arguments).values()]


def test_every_door_hands_it_on():
    """Percentages are estimated, so nothing is compiled for the GPU that is not here."""
    options = {"budget": "10%", "host_budget": "90%", "verify": False}
    xs = jnp.ones((2, 600, 8), jnp.float32)
    linen = bptt_jax.linen.RNN(nn.GRUCell(32), **options)
    decorated = bptt_jax.linen.rnn(**options)(nn.GRUCell)(32)
    modern = bptt_jax.nnx.RNN(nnx.GRUCell(8, 32, rngs=nnx.Rngs(0)), rngs=False, **options)
    graph, state, others = nnx.split(modern, nnx.Param, ...)
    losses = [
        (lambda xs: bptt_jax.scan(step, INIT, xs, **options)[0].sum(), XS),
        (lambda xs: bptt_jax.checkpointed(**options)(step)(INIT, xs)[0].sum(), XS),
        (lambda v: linen.apply(v, xs).sum(), linen.init(jax.random.key(0), xs)),
        (lambda v: decorated.apply(v, xs).sum(), decorated.init(jax.random.key(0), xs)),
        (
            lambda state, others: nnx.merge(graph, state, others)(
                xs, initial_carry=jnp.zeros((2, 32), jnp.float32)
            ).sum(),
            state,
            others,
        ),
    ]
    for loss, *arguments in losses:
        (plan,) = plans_of(loss, *arguments)
        assert uses_host(plan)


def test_without_it_no_plan_uses_the_host():
    (plan,) = plans_of(lambda xs: bptt_jax.scan(step, INIT, xs, budget="10%", verify=False)[0].sum(), XS)
    assert not uses_host(plan)


def test_plans_have_less_on_the_host_where_more_is_measured_there_than_predicted(monkeypatch):
    on_host = []

    def doubled(gradient, plan, form):
        taken = bptt_jax.cost(plan, measure(gradient, form))
        on_host.append(2 * taken.host_bytes)
        return Measured(taken.peak_bytes, 0.0, host_bytes=2.0 * taken.host_bytes)

    monkeypatch.setattr(_pipeline, "check", doubled)
    forget_everything()
    loss = jax.grad(lambda xs: bptt_jax.scan(step, INIT, xs, budget="10%", host_budget="90%")[0].sum())
    with planning_for("gpu"):
        (found,) = bptt_jax.explain_calls(loss, XS).values()
    forget_everything()
    assert found.host_bytes <= found.host_budget_bytes < on_host[0]
    assert found.measured_bytes <= found.budget_bytes
