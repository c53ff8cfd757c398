"""A model handed on in the carry through checkpoints, jits, branches and loops of the step is held once.

Each kind of call has its gradients compared, and its bytes are those of the model as an argument of the step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bptt_jax
from tests.support import comparison

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
_normal = np.random.default_rng(0).normal
MODEL = {"w": 0.1 * _normal(size=(16, 16)), "gain": 0.1 * _normal(size=16), "steps": np.arange(3)}
HIDDEN, XS = 0.1 * _normal(size=(4, 16)), _normal(size=(50, 4, 16))
HIDDEN_BYTES = HIDDEN.nbytes


def inner(model, hidden, x):
    unused = jnp.sin(hidden @ model["w"]) @ model["w"]  # dead equations
    del unused
    return model, jnp.tanh(hidden * model["gain"] + x @ model["w"])


def keep(model, hidden, x):
    return model, hidden


def _rule(model, hidden, x):
    """A function with a rule of the user's own; it does not return the model, whose gradient the rule decides about."""
    run = jax.custom_vjp(lambda model, hidden, x: inner(model, hidden, x)[1])
    run.defvjp(lambda *args: jax.vjp(lambda *args: inner(*args)[1], *args), lambda pull, ct: pull(ct))
    return model, run(model, hidden, x)


def _jvp_rule(model, hidden, x):
    weights = {"w": model["w"], "gain": model["gain"], "steps": 0}
    run = jax.custom_jvp(lambda weights, hidden, x: inner(weights, hidden, x)[1])
    run.defjvp(lambda primals, tangents: jax.jvp(lambda *args: inner(*args)[1], primals, tangents))
    return model, run(weights, hidden, x)


def _branch(model, hidden, x):
    return lax.cond(x[0, 0] > 0, inner, keep, model, hidden, x)


def _switch(model, hidden, x):
    return lax.switch(jnp.int32(x[0, 0] > 0), [inner, keep, keep], model, hidden, x)


def _loop(body, model, hidden, x):
    return lax.scan(lambda carry, _: (body(*carry, x), None), (model, hidden), None, 2)[0]


def _our_loop(body, model, hidden, x):
    return bptt_jax.scan(lambda carry, _: (body(*carry, x), None), (model, hidden), None, 2)[0]


CALLS = {
    "none": inner,
    "jit": jax.jit(inner),
    "checkpoint": jax.checkpoint(inner),
    "checkpoint of jit": jax.checkpoint(jax.jit(inner)),
    "jit of checkpoint": jax.jit(jax.checkpoint(inner)),
    "checkpoint of checkpoint": jax.checkpoint(lambda *args: jax.checkpoint(inner)(*args)),
    "policy": jax.checkpoint(inner, policy=jax.checkpoint_policies.dots_saveable),
    "branch": _branch,
    "checkpoint of a branch": jax.checkpoint(_branch),
    "switch": jax.jit(_switch),
    "loop": functools.partial(_loop, inner),
    "loop of checkpoints": functools.partial(_loop, jax.checkpoint(inner)),
    "checkpoint of a loop": jax.checkpoint(functools.partial(_loop, inner)),
    "loop of this library": functools.partial(_our_loop, inner),
    "checkpoint of a loop of this library": jax.checkpoint(functools.partial(_our_loop, inner)),
    "two checkpoints": lambda m, h, x: jax.checkpoint(inner)(*jax.checkpoint(inner)(m, h, x), x),
    "custom_vjp": _rule,
    "checkpoint of custom_vjp": jax.checkpoint(_rule),
    "checkpoint of custom_jvp": jax.checkpoint(_jvp_rule),
}


def step_of(call):
    def step(carry, x):
        model, hidden = CALLS[call](*carry, x)
        return (model, hidden), jnp.sum(hidden, 1)

    return step


def gradient(scan, step, order=1):
    def loss(weights, hidden, xs):
        (model, hidden), ys = scan(step, (MODEL | weights, hidden), xs)
        return jnp.sum(jnp.sin(ys)) + jnp.sum(hidden) + jnp.sum(model["w"] ** 2)

    arguments = {name: MODEL[name] for name in ("w", "gain")}, HIDDEN, XS
    first = jax.grad(loss, (0, 1, 2))
    return first(*arguments) if order == 1 else jax.jvp(first, arguments, arguments)[1]


@pytest.mark.one_in(29)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "options", [{}, {"budget": "60KB"}, {"budget": "60KB", "lowering": "nested"}, {"plan": "(5*[10])"}], ids=str
)
def test_gradients(options, call, order):
    """The gradients of a step that hands its model on through a call are those of `jax.lax.scan`."""
    step = step_of(call)
    ours = gradient(functools.partial(bptt_jax.scan, **options), step, order)
    comparison.assert_same(ours, gradient(lax.scan, step, order), tolerance=1e-10)


@pytest.mark.parametrize("call", CALLS)
def test_a_carry_is_what_a_step_changes(call):
    """4,608 bytes of a carry of 512, because the model in it went through the user's own `jax.checkpoint`."""
    profile = bptt_jax.explain(step_of(call), (MODEL, HIDDEN), XS, plan="(5*[10])").profile
    assert profile.carry_bytes == HIDDEN_BYTES


def test_the_last_carry_has_the_model_that_went_in():
    """Leaves that a step hands on are results of the scan, as of `jax.lax.scan`, also of one without steps."""
    for length in (50, 0):
        step = step_of("checkpoint")
        ours, theirs = (scan(step, (MODEL, HIDDEN), XS[:length]) for scan in (bptt_jax.scan, lax.scan))
        comparison.assert_same(ours, theirs, tolerance=1e-12)


@pytest.mark.parametrize("lowering", ["sweep", "nested"])
def test_the_users_checkpoint_is_not_evaluated_twice(lowering):
    """A step wrapped in `jax.checkpoint`, within a plan: each step ran three times, and runs as often as without."""
    seen = []

    def step(carry, x):
        jax.debug.callback(lambda: seen.append(1))
        return jnp.tanh(carry + x), None

    def evaluations(step):
        seen.clear()
        run = functools.partial(bptt_jax.scan, step, xs=XS, plan="(5*[10])", lowering=lowering)
        with bptt_jax.show_recomputation():
            jax.block_until_ready(jax.grad(lambda hidden: run(hidden)[0].sum())(HIDDEN))
        jax.effects_barrier()
        return len(seen)

    assert evaluations(jax.checkpoint(step)) == evaluations(step) <= 100


def test_several_checkpoints_within_a_step_stay():
    """Four layers with a checkpoint each, in a step: its residuals are the layers' inputs, as the user chose."""

    def layer(hidden, w):
        for _ in range(8):
            hidden = jnp.sin(hidden @ w)
        return hidden

    def residual_bytes(layer):
        def step(carry, _):
            w, hidden = carry
            for _ in range(4):
                hidden = layer(hidden, w)
            return (w, hidden), None

        return bptt_jax.explain(step, (MODEL["w"], HIDDEN), length=50, plan="(5*[10])").profile.sweep.residual_bytes

    assert residual_bytes(jax.checkpoint(layer)) == 4 * HIDDEN_BYTES
    assert residual_bytes(layer) >= 32 * HIDDEN_BYTES


def test_a_percentage_is_of_the_step_as_it_is_written():
    """`budget="50%"` of a step with a checkpoint: a share of what `jax.lax.scan` takes for it."""
    whole, part = (
        bptt_jax.explain(step_of("checkpoint"), (MODEL, HIDDEN), XS, budget=budget) for budget in (None, "50%")
    )
    assert part.store_all_bytes == whole.store_all_bytes
    assert part.budget_bytes == whole.store_all_bytes // 2
