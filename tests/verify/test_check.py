"""Checks: what is compiled, how often, what is remembered, and what happens where nothing can be compiled."""

import functools
import json
import os
import pickle
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bptt_jax
from bptt_jax import Steps
from bptt_jax._caches import forget_everything
from bptt_jax._device import processes as _processes
from bptt_jax._verify import check as _check
from bptt_jax._verify import temporaries as _temporaries
from bptt_jax.errors import BudgetError, BudgetWarning, UnverifiedWarning
from tests import audit
from tests.audit.kinds import KINDS
from tests.support.comparison import in_smallest_budget
from tests.support.quick_to_compile import as_users_do


def step(carry, x):
    return jnp.tanh(carry * x), carry


ARGUMENTS = (jnp.ones((8, 16), jnp.float32), jnp.ones((300, 8, 16), jnp.float32))


def gradient(**options):
    return jax.grad(lambda init: jnp.sum(bptt_jax.scan(step, init, ARGUMENTS[1], **options)[0]))(ARGUMENTS[0])


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled for checks, from nothing known."""
    found = []
    measured = _check.temporaries_of_gradient
    monkeypatch.setattr(_check, "temporaries_of_gradient", lambda *args: found.append(args) or measured(*args))
    forget_everything()
    yield found
    forget_everything()


def test_a_program_is_compiled_once_for_equal_steps(compiled):
    first = bptt_jax.explain(step, *ARGUMENTS, budget="50%")
    assert 1 <= len(compiled) == len(first.checks) <= 2
    assert first.measured_bytes == min(check.measured_bytes for check in first.checks if check.plan == first.plan)
    assert all(check.seconds > 0 for check in first.checks)
    # Another function with the same equations; and the call itself.
    again = bptt_jax.explain(lambda carry, x: step(carry, x), *ARGUMENTS, budget="50%")
    assert again.plan == first.plan
    jax.eval_shape(jax.grad(lambda *args: jnp.sum(bptt_jax.scan(step, *args, budget="50%")[0]), (0, 1)), *ARGUMENTS)
    assert len(compiled) == len(first.checks)
    assert str(first).count("predicted, ") == len(first.checks)
    assert [check.plan for check in first.checks if check.runs] == [first.plan]
    assert str(first).count(" s, runs") == 1


def test_what_plainly_fits_is_not_compiled(compiled):
    gradient(budget="1GB")
    gradient(budget="200%")
    assert not compiled


@pytest.mark.parametrize("lowering", [None, "nested"])
def test_without_checks_nothing_is_compiled(compiled, lowering):
    np.testing.assert_allclose(gradient(budget="60%", lowering=lowering, verify=False), gradient())
    assert not compiled
    report = bptt_jax.explain(step, *ARGUMENTS, budget="60%", lowering=lowering, verify=False)
    assert not report.checks
    assert "checks                     none, because verify=False" in str(report)
    assert report.measured_bytes <= report.budget_bytes


def test_where_nothing_can_be_compiled_the_plan_is_an_estimate(monkeypatch):
    def refuse(*_):
        raise ValueError("not in this mesh")

    monkeypatch.setattr(_check, "temporaries_of_gradient", refuse)
    forget_everything()
    np.testing.assert_allclose(gradient(budget="60%"), gradient())
    with pytest.warns(UnverifiedWarning, match="budget=30000 is kept by an estimate, because .* not in this mesh"):
        np.testing.assert_allclose(gradient(budget=30_000), gradient())
    report = bptt_jax.explain(step, *ARGUMENTS, budget="60%")
    assert report.measured_bytes is None
    assert "checks                     none, because it cannot be compiled by itself here (ValueError: not" in str(
        report
    )
    assert "measured by XLA            not known: it cannot be compiled by itself here" in str(report)
    with pytest.warns(UnverifiedWarning), pytest.raises(BudgetError, match="the smallest that would do is"):
        gradient(budget=1)
    forget_everything()


def test_a_program_that_is_too_large_to_compile_is_over(monkeypatch):
    """As compilers for a TPU refuse it."""
    measured = _check.temporaries_of_gradient

    def with_little_memory(gradient, program):
        size, on_host = measured(gradient, program)
        if size > 60_000:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")
        return size, on_host

    monkeypatch.setattr(_check, "temporaries_of_gradient", with_little_memory)
    forget_everything()
    report_of = functools.partial(bptt_jax.explain, step, *ARGUMENTS)
    assert report_of(budget=100_000).measured_bytes <= 60_000
    with pytest.raises(BudgetError, match="the smallest that would do is"):
        report_of(budget=1000)
    forget_everything()


@pytest.mark.parametrize(("length", "budget"), [(10, 350_000), (10, 1_200_000), (60, 1_700_000)])
def test_what_a_step_makes_and_drops_again_is_not_taken_to_fit(compiled, length, budget):
    """A product of 1 MiB that is summed at once, beside a carry of 4 kB."""

    def outer(carry, x):
        return jnp.tanh(jnp.einsum("bi,bj->bij", carry, x).sum(1)), None

    init, xs = jnp.ones((4, 256), jnp.float32), jnp.ones((length, 4, 256), jnp.float32)

    def measured(budget):
        def loss(init, xs):
            return jnp.sum(bptt_jax.scan(outer, init, xs, budget=budget)[0])

        program = jax.jit(jax.grad(loss, (0, 1))).lower(init, xs).compile()
        return program.memory_analysis().temp_size_in_bytes

    found, asked = in_smallest_budget(measured, budget)
    assert compiled
    assert found <= asked


def test_under_an_explicit_mesh_that_only_the_arrays_name(compiled):
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows = jax.NamedSharding(mesh, jax.P("rows", None))
    init = jax.device_put(ARGUMENTS[0], rows)
    xs = jax.device_put(ARGUMENTS[1], jax.NamedSharding(mesh, jax.P(None, "rows", None)))
    report = bptt_jax.explain(step, init, xs, budget=40_000)
    assert compiled
    assert report.measured_bytes <= 40_000


def test_in_double_precision_that_a_context_switches_on(compiled):
    """Inside a `shard_map`, where checks are compiled in a thread."""
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.enable_x64(True):
        init, xs = (jnp.asarray(leaf, jnp.float64) for leaf in ARGUMENTS)

        def gradient(init, xs):
            return jax.grad(lambda init: jnp.sum(bptt_jax.scan(step, init, xs, budget=60_000)[0]))(init)

        specs = jax.P("rows"), jax.P(None, "rows")
        run = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs[0]))
        program = run.lower(init, xs).compile()
    assert compiled
    assert program.memory_analysis().temp_size_in_bytes <= 60_000


def test_verify_must_be_a_bool():
    with pytest.raises(TypeError, match="verify must be True or False, got 'yes'"):
        bptt_jax.scan(step, *ARGUMENTS, verify="yes")


def with_rule(kept):
    """A step whose rule keeps so many arrays; JAX prints all of them alike."""

    @jax.custom_vjp
    def function(carry):
        return jnp.tanh(carry)

    def forward(carry):
        return jnp.tanh(carry), [jnp.sin(carry * i) for i in range(kept)]

    function.defvjp(forward, lambda saved, ct: (ct * sum(saved),))
    return lambda carry, x: (function(carry) + x, None)


def test_steps_with_other_rules_are_measured_apart():
    arguments = jnp.ones((8, 64), jnp.float32), jnp.ones((300, 8, 64), jnp.float32)
    few, many, again = (bptt_jax.explain(with_rule(kept), *arguments, budget=600_000) for kept in (1, 20, 1))
    assert many.measured_bytes <= 600_000
    assert many.plan != few.plan == again.plan


@pytest.mark.one_in(15)
@pytest.mark.parametrize(("kind", "lowering"), [(kind, way) for kind in KINDS for way in ("sweep", "nested")])
@pytest.mark.usefixtures("implicit_broadcasting")
def test_code_that_is_not_optimised_takes_the_same_buffers(monkeypatch, kind, lowering):
    """So checks take half of the time."""
    case = audit.Case(kind, 100, lowering)
    gradient = audit.gradient(case, case.problem(), None)
    program = audit.decide(case, case.problem(), None).program()
    quick = _temporaries.temporaries_of_gradient(gradient, program)
    monkeypatch.setattr(_temporaries, "_ASSIGN_ONLY", {"xla_backend_optimization_level": 3})
    assert _temporaries.temporaries_of_gradient(gradient, program) == quick


# The processes of a job.


def test_processes_agree_on_the_greatest_and_the_least(monkeypatch):
    from jax.experimental import multihost_utils

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    large = 2**53 - 1  # more than 32 bits hold

    of_other = np.frombuffer(np.float64(large).tobytes(), np.uint8)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.stack([own, of_other]))
    assert _processes.greatest_of_processes(7.0) == large
    assert _processes.least_of_processes(7.0) == 7.0


CHECKS = """
import jax, jax.numpy as jnp, json, sys
import bptt_jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/", 1)[-1]))
weight = jnp.ones((64, 64))
def step(carry, x):
    return jnp.tanh(carry @ weight + x), carry
init, xs = jnp.zeros((4, 64)), jnp.zeros((200, 4, 64))
events.clear()
report = bptt_jax.explain(step, init, xs, budget="20%")
print(json.dumps([events.count("cache_hits"), events.count("cache_misses"), report.measured_bytes, len(report.checks)]))
"""


def test_a_second_process_compiles_no_check_again(tmp_path):
    """With JAX's persistent compilation cache."""

    def run():
        command = [sys.executable, "-c", CHECKS, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=os.environ)
        return json.loads(done.stdout)

    hits, misses, measured, checks = run()
    assert hits == 0 < checks <= misses
    assert run() == [misses, 0, measured, checks]


# Percentages never raise.


@pytest.mark.parametrize("length", [1, 5, 23])
@pytest.mark.parametrize("lowering", [None, "nested"])
def test_a_percentage_of_a_short_scan_works(length, lowering):
    def value_and_grad(scan):
        def loss(init, xs):
            carry, ys = scan(step, init, xs)
            return jnp.sum(carry) + jnp.sum(ys)

        return jax.value_and_grad(loss, (0, 1))(ARGUMENTS[0], ARGUMENTS[1][:length])

    ours = functools.partial(bptt_jax.scan, budget="5%", lowering=lowering)
    evaluated = ours(step, ARGUMENTS[0], ARGUMENTS[1][:length])  # says nothing: warnings are errors here
    with pytest.warns(
        BudgetWarning, match="the smallest plan runs, because budget='5%' of this scan of length"
    ) as warned:
        found = value_and_grad(ours)
    assert len(warned) == 1
    assert warned[0].message.smallest_bytes > warned[0].message.budget_bytes
    assert warned[0].filename == __file__
    copied = pickle.loads(pickle.dumps(warned[0].message))
    assert (str(copied), copied.smallest_bytes) == (str(warned[0].message), warned[0].message.smallest_bytes)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, value_and_grad(jax.lax.scan))
    jax.tree.map(np.testing.assert_allclose, evaluated, jax.lax.scan(step, ARGUMENTS[0], ARGUMENTS[1][:length]))


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("implicit_broadcasting")
@pytest.mark.parametrize("length", [1, 5, 23])
@pytest.mark.parametrize("flax", ["linen", "nnx"])
def test_a_percentage_of_a_layer_on_a_short_sequence_works(flax, length):
    xs = jnp.ones((2, length, 8), jnp.float32)
    if flax == "linen":
        layers = [bptt_jax.linen.RNN(nn.GRUCell(8), budget="5%"), nn.RNN(nn.GRUCell(8))]
        variables = layers[0].init(jax.random.key(0), xs)
        gradients = [jax.grad(lambda given, layer=layer: layer.apply(given, xs).sum()) for layer in layers]
        arguments = [variables, variables]
    else:
        cell = nnx.GRUCell(8, 8, rngs=nnx.Rngs(0))
        arguments = [bptt_jax.nnx.RNN(cell, budget="5%"), nnx.RNN(cell)]
        gradients = 2 * [nnx.grad(lambda layer: layer(xs).sum())]
        np.testing.assert_allclose(*(layer(xs) for layer in arguments), rtol=1e-5)  # says nothing
    with pytest.warns(BudgetWarning) as warned:
        found = gradients[0](arguments[0])
    assert len(warned) == 1
    pairs = zip(*(jax.tree.leaves(one) for one in (found, gradients[1](arguments[1]))), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def with_default_flags():
    """Whether bytes are within the budget with XLA's own settings."""
    weight = jnp.ones((64, 64), jnp.float32)
    report = bptt_jax.explain(
        lambda carry, x: (jnp.tanh(carry @ weight + x), carry),
        jnp.zeros((1, 64), jnp.float32),
        jnp.zeros((500, 1, 64), jnp.float32),
        budget="10%",
    )
    return [report.measured_bytes, report.budget_bytes, len(report.checks)]


def test_with_the_settings_that_users_have():
    measured, asked, checks = as_users_do(__name__, "with_default_flags")
    assert 0.7 * asked <= measured <= asked
    assert checks <= 4


def test_a_plan_that_is_given_is_measured_when_explained(compiled):
    report = bptt_jax.explain(step, *ARGUMENTS, plan=Steps(300))
    assert len(compiled) == 1
    assert not report.checks
