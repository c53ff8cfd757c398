"""On long sequences the temporaries hold no copy of xs, of ys, or of their cotangents, whatever the length divides by.

Each of those is 1 KiB a step here, some 10 MiB in all, and the budgets are a fifth of that and less.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps

KIB, MIB = 2**10, 2**20
WIDTH, STATE = 256, 16
# The second is a prime.
BUDGETS = {10_000: 2 * MIB, 10_007: 1 * MIB}
DEEP = Repeat(10, Remat(Repeat(10, Remat(Repeat(10, Remat(Steps(10)))))))


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def wide(params, h, x):
    """A carry as large as x."""
    h = jnp.tanh(params["decay"] * h + x)
    return h, jnp.sin(h)


def narrow(params, h, x):
    """A small carry, with products to hoist (of x), to defer (of the carry) and to leave to the outputs."""
    h = jnp.tanh(h @ params["w"] + x @ params["v"])
    return h, h @ params["out"]


CELLS = {
    "wide": (wide, {"decay": f32(WIDTH)}, f32(WIDTH)),
    "narrow": (
        narrow,
        {"w": f32(STATE, STATE), "v": f32(WIDTH, STATE), "out": f32(STATE, WIDTH)},
        f32(STATE),
    ),
}


def runner(step, **options):
    def run(params, init, xs):
        return bptt_jax.scan(functools.partial(step, params), init, xs, **options)

    return run


def pullback(run):
    """What a budget is about: cotangents are arguments, and outputs and gradients results."""

    def vjp(params, init, xs, cotangents):
        results, pull = jax.vjp(run, params, init, xs)
        return results, pull(cotangents)

    return vjp


def gradient_of_xs(run):
    return jax.grad(lambda params, init, xs, _: jnp.sum(run(params, init, xs)[0]), argnums=2)


def gradient_of_weighted_ys(run):
    """The outputs are in the loss, and their cotangents arguments."""

    def loss(params, init, xs, weights):
        carry, ys = run(params, init, xs)
        return jnp.sum(carry * weights[0]) + jnp.sum(ys * weights[1])

    return jax.grad(loss, argnums=(0, 1, 2))


def temporaries(cell, derivative, length, **options):
    step, params, init = CELLS[cell]
    xs = f32(length, WIDTH)
    function = derivative(runner(step, **options))
    # The cotangents, or weights, of the last carry and of ys, which are as large as xs.
    compiled = jax.jit(function).lower(params, init, xs, (init, xs)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.one_in(7)
@pytest.mark.parametrize(("length", "budget"), BUDGETS.items())
@pytest.mark.parametrize("derivative", [pullback, gradient_of_xs, gradient_of_weighted_ys])
@pytest.mark.parametrize("cell", CELLS)
def test_temporaries_stay_within_the_budget(cell, derivative, length, budget):
    measured = temporaries(cell, derivative, length, budget=budget)
    print(f"{cell}, {derivative.__name__}, {length} steps: {measured / MIB:.2f} MiB for {budget / MIB} MiB")
    assert measured <= budget


@pytest.mark.parametrize("plan", [DEEP, Chain((DEEP, Steps(7)))], ids=["10^4", "10^4+7"])
@pytest.mark.parametrize("derivative", [pullback, gradient_of_weighted_ys])
@pytest.mark.parametrize("cell", CELLS)
def test_a_deep_plan_keeps_what_it_says(cell, derivative, plan):
    """Forty carries, ten steps' residuals, and gradients of weights: less than the part of xs that the outermost
    segment goes over, of which each level of a nest of loops over slices would make a copy.
    """
    measured = temporaries(cell, derivative, bptt_jax.plans.length(plan), plan=plan)
    print(f"{cell}, {derivative.__name__}, {bptt_jax.plans.notation(plan)}: {measured / KIB:.0f} KiB")
    assert measured <= 300 * KIB
