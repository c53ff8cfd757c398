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


def outputs_wider_than_the_carry(params, h, x):
    y = jax.nn.relu(h @ params["in"])
    return h * jax.nn.sigmoid(x + h @ params["gate"]) + jnp.tanh(y @ params["out"]), y


def small_products(params, h, x):
    y = jax.nn.gelu(h @ params["in"])
    h = h + jax.nn.swish(y * y) @ params["out"]
    return h, h


def products_wider_than_the_carry(params, h, x):
    y = jnp.tanh(jnp.tanh(h @ params["in"]) @ params["square"])
    return h + x * jnp.tanh(y @ params["out"]), h


def lstm(params, carry, x):
    h, c = carry
    i, f, g, o = jnp.split(h @ params["h"] + x @ params["x"], 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def embedding(params, h, x):
    h = jnp.tanh(h @ params["w"] + params["table"][x])
    return h, h @ params["table"].T


AT_A_FIXED_PLACE = {
    "outputs wider than the carry": (
        outputs_wider_than_the_carry,
        {"in": f32(16, 192), "gate": f32(16, 16), "out": f32(192, 16)},
        f32(32, 16),
        f32(32, 16),
    ),
    "small products": (small_products, {"in": f32(48, 16), "out": f32(16, 48)}, f32(4, 48), f32(4, 1)),
    "products wider than the carry": (
        products_wider_than_the_carry,
        {"in": f32(32, 128), "square": f32(128, 128), "out": f32(128, 32)},
        f32(16, 32),
        f32(16, 32),
    ),
    "lstm": (lstm, {"h": f32(64, 256), "x": f32(32, 256)}, (f32(8, 64), f32(8, 64)), f32(8, 32)),
}
# The gradients of its table are summed step by step.
WITH_SUMS = embedding, {"w": f32(32, 32), "table": f32(300, 32)}, f32(4, 32), jax.ShapeDtypeStruct((4,), jnp.int32)


def measured_of_predicted(cell, plan):
    """What XLA reports for a plan, relative to what its calibrated profile predicts."""
    step, params, init, x = cell
    found = []

    def at(params, init, x):
        found.append(bptt_jax.profile(functools.partial(step, params), init, x, calibrate=True))

    jax.eval_shape(at, params, init, x)
    run = runner(step, plan=plan)
    xs = jax.ShapeDtypeStruct((bptt_jax.plans.length(plan), *x.shape), x.dtype)
    cotangents = jax.eval_shape(run, params, init, xs)
    compiled = jax.jit(pullback(run)).lower(params, init, xs, cotangents).compile()
    measured = compiled.memory_analysis().temp_size_in_bytes
    predicted = bptt_jax.cost(plan, found[0]).peak_bytes
    print(f"{step.__name__}, {bptt_jax.plans.notation(plan)}: {measured:,} of {predicted:,}")
    return measured / predicted


@pytest.mark.parametrize(("k", "n", "last"), [(2, 37, 26), (2, 3, 40), (6, 22, 18)])
@pytest.mark.parametrize("name", AT_A_FIXED_PLACE)
def test_a_last_block_takes_what_is_predicted(name, k, n, last):
    """XLA makes room for it before the loop runs: it was up to 30 % above a prediction that did not know that."""
    assert 0.85 <= measured_of_predicted(AT_A_FIXED_PLACE[name], Chain((Repeat(k, Remat(Steps(n))), Steps(last)))) <= 1


@pytest.mark.parametrize(("k", "n", "last"), [(19, 5, 5), (7, 13, 9)])
def test_sums_of_gradients_are_there_beside_a_last_block(k, n, last):
    assert 0.7 <= measured_of_predicted(WITH_SUMS, Chain((Repeat(k, Remat(Steps(n))), Steps(last)))) <= 1


@pytest.mark.parametrize("name", AT_A_FIXED_PLACE)
def test_blocks_in_a_row_take_what_is_predicted(name):
    """Operands of products are there twice, if and only if the loop over a block's steps reads them as well."""
    assert 0.85 <= measured_of_predicted(AT_A_FIXED_PLACE[name], Repeat(2, Steps(48))) <= 1
