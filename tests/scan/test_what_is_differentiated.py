"""A scan is planned, and keeps arrays, for exactly the inputs that it is differentiated with respect to."""

import functools
import itertools
from collections import Counter

import flax.linen as nn
import jax
import jax.monitoring
import jax.numpy as jnp
import pytest
from jax import lax

import bptt_jax
from bptt_jax import Remat, Repeat, Steps
from bptt_jax.errors import BudgetError, BudgetWarning
from tests.measure.test_bytes import temporaries
from tests.support import comparison
from tests.support.steps import normal

LENGTH, BATCH, WIDTH = 100, 16, 32


def step(params, h, x):
    """A recurrent cell behind a wide encoder of x, which most of what a gradient keeps belongs to."""
    first, second = params["encoder"]
    encoded = jnp.tanh(x["input"] @ first) @ second
    new = jnp.tanh(h @ params["w"] + encoded) + 0.1 * jnp.sin(h) * x["drive"]
    h = jnp.where(x["valid"], new, h)
    return h, h.sum(-1)


def draw(seed, *shape):
    return 0.3 * normal(seed, *shape, dtype=jnp.float64)


def inputs(length=LENGTH):
    """Parameters, first carry and xs."""
    weights = draw(0, WIDTH, WIDTH), (draw(1, WIDTH, 4 * WIDTH), draw(2, 4 * WIDTH, WIDTH))
    xs = {"input": draw(4, length, BATCH, WIDTH), "drive": draw(5, length, BATCH, WIDTH)}
    params = dict(zip(("w", "encoder"), weights, strict=True))
    return params, draw(3, BATCH, WIDTH), xs | {"valid": jnp.arange(length) % 7 > 0}


# From inputs to those that are differentiated, and from them and inputs to inputs.
PARTS = {
    "weights": (lambda p, h, xs: p, lambda new, p, h, xs: (new, h, xs)),
    "a weight": (lambda p, h, xs: p["w"], lambda new, p, h, xs: (p | {"w": new}, h, xs)),
    "the encoder": (lambda p, h, xs: p["encoder"], lambda new, p, h, xs: (p | {"encoder": new}, h, xs)),
    "init": (lambda p, h, xs: h, lambda new, p, h, xs: (p, new, xs)),
    "a leaf of xs": (lambda p, h, xs: xs["drive"], lambda new, p, h, xs: (p, h, xs | {"drive": new})),
    "xs": (
        lambda p, h, xs: {name: xs[name] for name in ("input", "drive")},
        lambda new, p, h, xs: (p, h, xs | new),
    ),
    "a weight and init": (lambda p, h, xs: (p["w"], h), lambda new, p, h, xs: (p | {"w": new[0]}, new[1], xs)),
    "everything": (
        lambda p, h, xs: (p, h, {name: xs[name] for name in ("input", "drive")}),
        lambda new, p, h, xs: (new[0], new[1], xs | new[2]),
    ),
}
WITHOUT_ENCODER = ("a weight", "init", "a leaf of xs", "a weight and init")
LOWERINGS = (None, "nested")


def loss_of(part, scan, length=LENGTH):
    """A loss as a function of a part of the inputs, and that part."""
    take, put = PARTS[part]
    given = inputs(length)

    def loss(chosen):
        params, init, xs = put(chosen, *given)
        carry, ys = scan(functools.partial(step, params), init, xs)
        return jnp.sum(jnp.sin(carry)) + jnp.sum(ys**2)

    return loss, take(*given)


def bytes_of(part, scan):
    loss, chosen = loss_of(part, scan)
    return temporaries(jax.grad(loss), chosen)


@functools.cache
def bytes_of_lax_scan(part):
    return bytes_of(part, lax.scan)


@pytest.mark.one_in(7)
@pytest.mark.parametrize(("part", "lowering", "limit"), list(itertools.product(PARTS, LOWERINGS, ("none", "budget"))))
def test_equals_lax_scan(part, lowering, limit):
    def of(scan):
        loss, chosen = loss_of(part, scan, length=12)
        return jax.jit(jax.grad(loss))(chosen)

    ours = functools.partial(bptt_jax.scan, lowering=lowering)
    if limit == "budget":
        ours = functools.partial(ours, verify=False)
        found, _ = comparison.in_smallest_budget(lambda n: of(functools.partial(ours, budget=n)))
    else:
        found = of(ours)
    comparison.assert_same(found, of(lax.scan), tolerance=1e-10)


@pytest.mark.one_in(23)
@pytest.mark.parametrize(("lowering", "part", "share"), list(itertools.product(LOWERINGS, PARTS, (0.4, 0.2))))
def test_within_a_budget_of_its_own(lowering, part, share):
    """A share of what `jax.lax.scan` takes for that gradient, or the smallest that does; and a percentage is of it."""
    whole = bytes_of_lax_scan(part)

    def measured(budget):
        return bytes_of(part, functools.partial(bptt_jax.scan, budget=budget, lowering=lowering))

    found, budget = comparison.in_smallest_budget(measured, int(share * whole))
    print(f"{part} {lowering}: {found / whole:.3f} of {whole}, asked {budget / whole:.3f}")
    assert found <= budget <= 0.4 * whole
    with pytest.warns(BudgetWarning) as warned:
        measured("0.1%")
    assert 0.9 * whole <= 1000 * warned[0].message.budget_bytes <= 1.1 * whole


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_what_is_not_differentiated_is_not_paid_for(lowering):
    """Neither in a program of its own, nor in what the pullback holds."""
    ours = functools.partial(bptt_jax.scan, lowering=lowering)

    def held(part):
        loss, chosen = loss_of(part, ours)
        pull = jax.eval_shape(lambda chosen: jax.vjp(loss, chosen)[1], chosen)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    for measured in (functools.partial(bytes_of, scan=ours), held):
        all_bytes = measured("everything")
        found = {part: measured(part) for part in PARTS}
        print({part: f"{size / all_bytes:.2f}" for part, size in found.items()})
        assert all(found[part] < 0.6 * all_bytes for part in WITHOUT_ENCODER)
        assert max(found.values()) == all_bytes


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("part", PARTS)
def test_without_a_budget_it_takes_what_lax_scan_takes(part, lowering):
    found = bytes_of(part, functools.partial(bptt_jax.scan, lowering=lowering))
    print(f"{part}: {found / bytes_of_lax_scan(part):.3f} of {bytes_of_lax_scan(part)}")
    assert found <= 1.1 * bytes_of_lax_scan(part)


def test_a_weight_that_is_stopped_is_not_differentiated():
    """Like one that is no argument of the gradient: its budget is that of the others."""

    def asked(stop):
        params, init, xs = inputs()

        def loss(params):
            frozen = params | {"encoder": jax.tree.map(stop, params["encoder"])}
            return jnp.sum(bptt_jax.scan(functools.partial(step, frozen), init, xs, budget="0.1%")[1])

        with pytest.warns(BudgetWarning) as warned:
            jax.eval_shape(jax.grad(loss), params)
        return warned[0].message.budget_bytes

    assert asked(lax.stop_gradient) < 0.6 * asked(lambda leaf: leaf)


def test_results_without_a_tangent_are_not_differentiated():
    """Gradients of one program with respect to one input after another; then of none."""
    loss, chosen = loss_of("everything", functools.partial(bptt_jax.scan, budget=1, verify=False), length=12)
    with pytest.raises(BudgetError):
        jax.eval_shape(jax.grad(loss), chosen)
    reference, _ = loss_of("everything", lax.scan, length=12)
    assert jnp.allclose(loss(chosen), reference(chosen))
    assert jnp.allclose(jax.grad(lambda s: s * lax.stop_gradient(loss(chosen)))(1.0), reference(chosen))


# Evaluations: no derivatives, so nothing to plan.


def programs(run):
    """How many programs are compiled by a function."""
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(run())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(compiled)


def evaluated(budget):
    def run(params, init, xs):
        return bptt_jax.scan(functools.partial(step, params), init, xs, budget=budget)

    return lambda: jax.jit(run)(*inputs())


def evaluated_without_jit(budget):
    params, init, xs = inputs()
    return lambda: bptt_jax.scan(functools.partial(step, params), init, xs, budget=budget)


def evaluated_under_vmap(budget):
    params, init, xs = inputs()

    def run(init):
        return bptt_jax.scan(functools.partial(step, params), init, xs, budget=budget)

    return lambda: jax.jit(jax.vmap(run))(jnp.stack([init, 2 * init]))


def layer_applied(budget):
    layer = bptt_jax.linen.RNN(nn.GRUCell(8), budget=budget)
    xs = jnp.ones((2, LENGTH, 8), jnp.float32)
    variables = layer.init(jax.random.key(0), xs)
    return lambda: jax.jit(layer.apply)(variables, xs)


def layer_made(budget):
    layer = bptt_jax.linen.RNN(nn.GRUCell(8), budget=budget)
    return lambda: jax.tree.leaves(layer.init(jax.random.key(0), jnp.ones((2, LENGTH, 8), jnp.float32)))


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("implicit_broadcasting")
@pytest.mark.parametrize("make", [evaluated, evaluated_without_jit, evaluated_under_vmap, layer_applied, layer_made])
def test_an_evaluation_compiles_nothing_for_its_budget(make):
    """Nor is anything said, though no gradient fits 1 %."""
    without, budgeted = (programs(make(budget)) for budget in (None, "1%"))
    assert budgeted == without > 0


@pytest.mark.usefixtures("implicit_broadcasting")
def test_the_gradient_of_the_layer_takes_the_smallest_plan_and_says_so_once():
    layer = bptt_jax.linen.RNN(nn.GRUCell(8), budget="1%")
    xs = jnp.ones((2, LENGTH, 8), jnp.float32)
    variables = layer.init(jax.random.key(0), xs)
    with pytest.warns(BudgetWarning, match="the smallest plan runs, because budget='1%'") as warned:
        found = jax.grad(lambda variables: layer.apply(variables, xs).sum())(variables)
    assert len(warned) == 1
    theirs = nn.RNN(nn.GRUCell(8))
    comparison.assert_same(found, jax.grad(lambda variables: theirs.apply(variables, xs).sum())(variables), 1e-5)


# Derivatives never run the Python of a step again.

FORMS = {
    "plain": lambda loss, w, x: loss(w, x),
    "jit": lambda loss, w, x: jax.jit(loss)(w, x),
    "grad": lambda loss, w, x: jax.grad(loss)(w, x),
    "jit of grad": lambda loss, w, x: jax.jit(jax.grad(loss, (0, 1)))(w, x),
    "jvp": lambda loss, w, x: jax.jvp(loss, (w, x), (w, x)),
    "grad of vmap": lambda loss, w, x: jax.jit(jax.grad(lambda w: jax.vmap(loss)(w, x[None]).sum()))(w[None]),
    "vmap of jit of grad": lambda loss, w, x: jax.vmap(jax.jit(jax.grad(loss)))(w[None], x[None]),
    "hessian": lambda loss, w, x: jax.jit(jax.hessian(loss))(w, x),
    "grad of checkpoint": lambda loss, w, x: jax.jit(jax.grad(jax.checkpoint(loss)))(w, x),
}
OPTIONS = ({}, {"lowering": "nested"}, {"plan": Repeat(2, Remat(Steps(2)))}, {"verify": False})


def traces(scan, form, deep):
    """How often each of the steps of scans within each other is traced."""
    seen = Counter()

    def run(level, w, carry, x):
        def step(carry, x):
            seen[level] += 1
            return (jnp.tanh(carry * w + x) if level == 1 else run(level - 1, w, carry, x)), carry

        return scan(step, carry, x)[0]

    w, x = jnp.linspace(0.1, 0.9, 64), jnp.ones((4,) * deep + (64,))
    jax.clear_caches()
    FORMS[form](lambda w, x: jnp.sum(run(deep, w, jnp.ones(64), x)), w, x)
    return seen


@pytest.mark.one_in(23)
@pytest.mark.parametrize(("deep", "options", "form"), list(itertools.product((1, 3), OPTIONS, FORMS)), ids=str)
def test_a_step_is_traced_as_often_as_in_lax_scan(deep, options, form):
    """In three scans within each other, each step; also where a budget is planned for, which the last options have."""

    def counted(budget=None):
        return traces(functools.partial(bptt_jax.scan, budget=budget, **options), form, deep)

    seen = comparison.in_smallest_budget(counted)[0] if "verify" in options else counted()
    assert seen == traces(lax.scan, form, deep)
    assert set(seen) == set(range(1, deep + 1))
    assert max(seen.values()) <= 2
