"""Under `jax.vmap` all examples together keep the budget, in any order with `jax.grad` and `jax.jit`."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import bptt_jax
from bptt_jax.errors import BudgetWarning
from tests.measure.test_bytes import temporaries
from tests.promise.test_layer_bytes import moved_in
from tests.support import comparison
from tests.support.quick_to_compile import as_users_do

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
LENGTH = 200


def lstm(width):
    """An LSTM as written by hand, for one example: its parameters, step and first carry."""
    keys = jax.random.split(jax.random.key(0), 2)
    wx, wh = (0.05 * jax.random.normal(key, (width, 4 * width), jnp.float32) for key in keys)

    def step(params, carry, x):
        h, s = carry
        i, f, g, o = jnp.split(h @ params["wh"] + x @ params["wx"] + params["b"], 4, -1)
        s = jax.nn.sigmoid(f) * s + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(s)
        return (h, s), h

    zero = jnp.zeros(width, jnp.float32)
    return {"wx": wx, "wh": wh, "b": jnp.zeros(4 * width, jnp.float32)}, step, (zero, zero)


def flax_gru(width):
    cell, zero = nn.GRUCell(width), jnp.zeros(width, jnp.float32)
    params = cell.init(jax.random.key(0), zero, zero)
    return params, cell.apply, zero


def gradient_of_vmap(loss, params, xs):
    return jax.grad(lambda params: jax.vmap(functools.partial(loss, params))(xs).sum())(params)


def gradient_of_vmap_of_jit(loss, params, xs):
    return gradient_of_vmap(jax.jit(loss), params, xs)


def vmap_of_gradient(loss, params, xs):
    return jax.vmap(functools.partial(jax.grad(loss), params))(xs)


def vmap_of_jit_of_gradient(loss, params, xs):
    return jax.vmap(functools.partial(jax.jit(jax.grad(loss)), params))(xs)


ONE_SUM = (gradient_of_vmap, gradient_of_vmap_of_jit)
ORDERS = (*ONE_SUM, vmap_of_gradient, vmap_of_jit_of_gradient)
CELLS = (lstm, flax_gru)


def bytes_of(cell, order, examples, scan):
    width = 32 if examples > 100 and order not in ONE_SUM else 64  # as many gradients of the weights as examples
    params, step, init = cell(width)

    def loss(params, x):
        carry, _ = scan(functools.partial(step, params), init, x)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(carry))

    xs = jax.ShapeDtypeStruct((examples, LENGTH, width), jnp.float32)
    return temporaries(functools.partial(order, loss), params, xs)


@functools.cache
def bytes_of_lax_scan(cell, order, examples):
    return bytes_of(cell, order, examples, lax.scan)


def cases(few, *columns):
    """Of so few examples those rows that `one_in` picks by default; of 256 all are slow."""
    rows = [(cell, order, n, *column) for cell in CELLS for n in few for order in ORDERS for column in columns]
    many = [(cell, order, 256, *column) for cell in CELLS for order in ORDERS for column in columns]
    return rows + [pytest.param(*row, marks=pytest.mark.slow) for row in many]


@pytest.mark.one_in(37)
@pytest.mark.parametrize(
    ("cell", "order", "examples", "share", "lowering"),
    cases((1, 16), (0.1, None), (0.3, None), (0.1, "nested"), (0.3, "nested")),
)
def test_within_the_budget(cell, order, examples, share, lowering):
    """Where so little does not do, within the smallest budget that does, as errors name it.

    A tenth is too little for one example, and for gradients of each example: they do not grow with the length.
    """
    whole = bytes_of_lax_scan(cell, order, examples)
    asked = int(share * whole)

    def measured(budget):
        return bytes_of(cell, order, examples, functools.partial(bptt_jax.scan, budget=budget, lowering=lowering))

    found, budget = comparison.in_smallest_budget(measured, asked)
    print(f"{order.__name__} {examples} {lowering}: {found / whole:.3f} of {whole}, asked {budget / whole:.3f}")
    assert found <= budget <= whole
    if lowering is None:
        assert budget <= 0.3 * whole
        assert budget == asked or order not in ONE_SUM or examples == 1


@pytest.mark.parametrize("cell", CELLS)
def test_xs_of_many_examples_are_not_transposed(cell):
    """Of the gradient of a vmap; in XLA's text, where only the blocks that are read are."""
    params, step, init = cell(32)
    length = 199  # of which no other size is a multiple

    def loss(params, x):
        return sum(
            jnp.sum(leaf**2) for leaf in bptt_jax.scan(functools.partial(step, params), init, x, budget="10%")[0]
        )

    xs = jax.ShapeDtypeStruct((256, length, 32), jnp.float32)
    assert not moved_in(functools.partial(gradient_of_vmap, loss), (params, xs), length)


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("cell", "order", "examples", "lowering"), cases((16,), (None,), ("nested",)))
def test_never_more_than_lax_scan(cell, order, examples, lowering):
    found = bytes_of(cell, order, examples, functools.partial(bptt_jax.scan, lowering=lowering))
    print(f"{order.__name__} {examples} {lowering}: {found} of {bytes_of_lax_scan(cell, order, examples)}")
    assert found <= bytes_of_lax_scan(cell, order, examples)


def of_one_example():
    """Bytes of gradients of a batch of one, by this library and by `jax.lax.scan`.

    XLA copies axes of length 1 or not, by settings that the tests change.
    """
    jax.config.update("jax_enable_x64", True)
    pairs = itertools.product(CELLS, (gradient_of_vmap, vmap_of_jit_of_gradient))
    return [[bytes_of(cell, order, 1, scan) for scan in (bptt_jax.scan, lax.scan)] for cell, order in pairs]


@pytest.mark.slow
def test_one_example_takes_never_more_than_lax_scan():
    for ours, theirs in as_users_do(__name__, "of_one_example"):
        print(f"{ours} of {theirs}")
        assert ours <= theirs


@pytest.mark.one_in(7)
@pytest.mark.parametrize("order", ORDERS)
def test_a_percentage_is_of_all_examples(order):
    """Of what `jax.lax.scan` takes for them, as predicted from shapes."""
    whole = bytes_of_lax_scan(lstm, order, 16)
    found = bytes_of(lstm, order, 16, functools.partial(bptt_jax.scan, budget="40%"))
    print(f"{order.__name__}: {found / whole:.3f} of {whole}")
    assert 0.1 * whole <= found <= 0.42 * whole


@pytest.mark.one_in(7)
@pytest.mark.parametrize("order", ORDERS[:3])
def test_a_percentage_that_no_plan_fits_is_that_of_all_examples(order):
    """Where the gradient was traced before it was mapped, of one example as well."""
    whole = bytes_of_lax_scan(lstm, order, 16)
    with pytest.warns(BudgetWarning) as warned:
        bytes_of(lstm, order, 16, functools.partial(bptt_jax.scan, budget="1%"))
    assert 0.9 * whole <= 100 * max(one.message.budget_bytes for one in warned) <= 1.2 * whole
