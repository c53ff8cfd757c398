"""What the README's table says of other ways to bound a scan's memory."""

import jax
import jax.numpy as jnp
import pytest

import bptt_jax
from bptt_jax._bench.cells import CELLS
from bptt_jax._bench.comparison import compiled
from bptt_jax._bench.methods import Ours
from bptt_jax._bench.peers import checkpointed_step, equinox, evaluations, nest

SHORT, LONG = 400, 1600


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's: Equinox promotes."""


def step(weights, carry, x):
    """What it keeps is twice its carry."""
    return jnp.tanh(jnp.sin(carry @ weights) + x), None


def gradient(scan):
    def loss(weights, init, xs):
        return scan(lambda carry, x: step(weights, carry, x), init, xs)[0].sum()

    return jax.grad(loss)


def arguments(length):
    return jnp.eye(16), jnp.ones((8, 16)), jnp.ones((length, 8, 16))


def growth(scan_of_length):
    """How many times as many temporaries the gradient takes for four times the length."""
    short, long = (
        jax.jit(gradient(scan_of_length(length))).lower(*arguments(length)).compile().memory_analysis()
        for length in (SHORT, LONG)
    )
    return long.temp_size_in_bytes / short.temp_size_in_bytes


def bounded(step, init, xs, **options):
    return bptt_jax.scan(step, init, xs, budget="40KiB", **options)


WAYS = {
    "lax.scan": lambda length: jax.lax.scan,
    "each step": lambda length: checkpointed_step,
    "nest": lambda length: nest(int(length**0.5), int(length**0.5)),
    "equinox": lambda length: equinox(10),
    "ours": lambda length: bounded,
}


@pytest.mark.parametrize(
    ("way", "least", "most"),
    [("lax.scan", 3.5, 4), ("each step", 3.5, 4), ("nest", 1.7, 2.2), ("equinox", 1, 1.1), ("ours", 0.9, 1.1)],
)
def test_temporaries_of_four_times_the_steps(way, least, most):
    assert least <= growth(WAYS[way]) <= most


@pytest.mark.parametrize("way", [way for way in WAYS if way != "equinox"])
def test_forward_mode(way):
    scan = WAYS[way](16)
    primals = arguments(16)
    _, tangent = jax.jvp(lambda *given: scan(lambda c, x: step(given[0], c, x), *given[1:])[0].sum(), primals, primals)
    assert jnp.isfinite(tangent)


def test_equinox_has_no_forward_mode():
    primals = arguments(16)
    with pytest.raises(Exception, match=r"forward-mode autodiff|custom_vjp"):
        jax.jvp(lambda *given: equinox(4)(lambda c, x: step(given[0], c, x), *given[1:])[0].sum(), primals, primals)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "nest"])
def test_a_prime_number_of_steps(way):
    jax.eval_shape(gradient(WAYS[way](17)), *arguments(17))


def test_a_nest_by_hand_needs_factors():
    with pytest.raises(TypeError, match="reshape"):
        jax.eval_shape(gradient(nest(4, 4)), *arguments(17))


def test_equinox_evaluates_a_step_twice_however_many_slots_there_are():
    assert evaluations(equinox(100), 100) >= 199
    assert evaluations(bounded, 100) == 100


def test_all_agree():
    expected = gradient(jax.lax.scan)(*arguments(16))
    for way in WAYS.values():
        assert jnp.allclose(gradient(way(16))(*arguments(16)), expected, rtol=1e-4)


def test_auto_is_a_budget_of_the_comparison():
    problem = CELLS["lstm"](2, 8)
    _, row = compiled(Ours("auto"), problem, problem.xs(20))
    assert (row.method, row.error) == ("bptt_jax, auto", "")
    assert row.temp_bytes > 0
