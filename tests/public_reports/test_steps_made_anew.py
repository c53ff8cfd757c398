"""A step defined inside its caller is another function at each call: for equal equations nothing is done again.

A wrong match would be a wrong gradient, so steps that differ in the least are tried as well.
"""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, monitoring

import bptt_jax
from bptt_jax._jaxprs.structure import structure
from bptt_jax._trace.call import FlatStep
from tests.support import comparison

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
WEIGHT, INIT, XS = (np.random.default_rng(i).normal(size=shape) for i, shape in enumerate([(8, 8), 8, (30, 8)]))
WAYS = [{}, {"budget": "12kB"}, {"budget": "12kB", "lowering": "nested"}, {"plan": "(5*[6])"}, {"budget": "200%"}]


def forward_rule(rule):
    """The identity, with a derivative of the user's own from x and its tangent."""
    function = jax.custom_jvp(lambda x: x)
    function.defjvp(lambda primals, tangents: (primals[0], rule(primals[0], tangents[0])))
    return function


def of_order(factor, order):
    """The identity, whose derivative of this order, and none below it, has a factor."""
    return forward_rule(lambda x, t: factor * t if order == 1 else of_order(factor, order - 1)(x) * t)


def of_jax(factor, by_arguments=False):
    """`jnp.sin` with a derivative of the user's own."""
    function = jax.custom_jvp(jnp.sin)
    if by_arguments:
        function.defjvps(lambda t, _, x: factor * t * jnp.cos(x))
    else:
        function.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), factor * tangents[0] * jnp.cos(primals[0])))
    return function


def backward_rule(rule):
    """The identity, with a cotangent of the user's own from x and the cotangent of the result."""
    function = jax.custom_vjp(lambda x: x)
    function.defvjp(lambda x: (x, x), lambda x, ct: (rule(x, ct),))
    return function


ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "branch": lambda x: lax.cond(x[0] > 0, jnp.tanh, jnp.sin, x),
    "loop": lambda x: lax.scan(lambda x, _: (jnp.tanh(x), None), x, None, 3)[0],
    "scan": lambda x: bptt_jax.scan(lambda x, _: (jnp.tanh(x), None), x, None, 3)[0],
    "checkpoint": jax.checkpoint(jnp.tanh),
    "own rule": forward_rule(lambda x, t: 2 * t),
    "own backward rule": backward_rule(lambda x, ct: 2 * ct),
}


def eager_gradient(scan, activation):
    def step(carry, x):
        carry = activation(carry @ WEIGHT + x)
        return carry, None

    return jax.grad(lambda init: scan(step, init, XS)[0].sum())(INIT)


@pytest.fixture
def compiled():
    """The programs compiled since the test began, a number for each."""
    found = []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            found.append(seconds)

    monitoring.register_event_duration_secs_listener(listen)
    yield found
    monitoring.unregister_event_duration_listener(listen)


@pytest.mark.one_in(17)
@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_second_call_compiles_nothing(activation, options, compiled):
    """Eager gradients of a step made anew at each call took 340 ms a call, `jax.lax.scan` 60."""
    scan, function = functools.partial(bptt_jax.scan, **options), ACTIVATIONS[activation]
    first = eager_gradient(scan, function)
    compiled.clear()
    comparison.assert_same(eager_gradient(scan, function), first, tolerance=0)
    assert not compiled
    comparison.assert_same(first, eager_gradient(lax.scan, function), tolerance=1e-12)
    assert compiled  # of jax.lax.scan: the listener works


DIFFERENT = [
    (lambda x: x * 0.5, lambda x: x * 0.25),
    (lambda x: x / 0.0, lambda x: x / -0.0),
    (lambda x: x[:4], lambda x: x[1:5]),
    (lambda x: x.astype(jnp.float32), lambda x: x.astype(jnp.float16)),
    (lambda x: jnp.sum(x), lambda x: jnp.sum(x, keepdims=True)),
    (lambda x: jnp.dot(x, x, precision="highest"), lambda x: jnp.dot(x, x)),
    (lambda x: jax.jit(jnp.sin)(x), lambda x: jax.jit(jnp.cos)(x)),
    (lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), lambda x: lax.cond(x[0] > 0, jnp.cos, jnp.sin, x)),
    (lambda x: lax.stop_gradient(x), lambda x: x + 0),
    *((of_order(2.0, order), of_order(3.0, order)) for order in (1, 2)),
    (forward_rule(lambda x, t: x * jnp.sum(t)), forward_rule(lambda x, t: t * jnp.sum(x))),
    (forward_rule(lambda x, t: t), forward_rule(lambda x, t: t * x)),
    (of_jax(2.0), of_jax(3.0)),
    (of_jax(2.0, by_arguments=True), of_jax(3.0, by_arguments=True)),
    (backward_rule(lambda x, ct: 2 * ct), backward_rule(lambda x, ct: 3 * ct)),
    (backward_rule(lambda x, ct: ct), backward_rule(lambda x, ct: x)),
    (backward_rule(lambda x, ct: ct + 0.1 * ct), backward_rule(lambda x, ct: ct + 0.1 * x)),
    (jax.checkpoint(backward_rule(lambda x, ct: ct)), jax.checkpoint(backward_rule(lambda x, ct: x))),
    (lambda x: jnp.sin(x), lambda x: jax.named_scope("a")(jnp.sin)(x)),
    (jax.checkpoint(jnp.sin), jnp.sin),
    (jax.checkpoint(jnp.sin), jax.checkpoint(jnp.sin, policy=jax.checkpoint_policies.everything_saveable)),
    (lambda x: x, lambda x: 1 * x),
    (lambda x: x[0], lambda x: x[:1]),
    (lambda x: (jax.debug.print("a"), x)[1], lambda x: (jax.debug.print("b"), x)[1]),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_steps_that_differ_have_different_keys(one, other):
    """Constants and their signs, slices, types, contexts, and derivative rules of any order."""
    keys = [structure(jax.make_jaxpr(lambda x, f=f: f(x))(INIT)) for f in (one, one, other)]
    assert keys[0] == keys[1] != keys[2]
    assert None not in keys


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (jax.debug.callback(lambda x: None, x), x)[1],
        lambda x: jax.pure_callback(lambda x: x, x, x),
        lambda x: jax.pure_callback(np.sin, x, x),
        of_order(2.0, 3),
    ],
)
def test_functions_without_a_key(function):
    """Callbacks may look alike and differ, and a key would keep what they close over alive; rules may be too deep."""
    assert structure(jax.make_jaxpr(function)(INIT)) is None


@pytest.mark.parametrize(("one", "other"), [pair for pair in DIFFERENT if hasattr(pair[0], "defvjp")])
def test_gradients_of_rules_that_look_alike(one, other):
    """One rule after the other: the second got the first one's gradient, silently, if x stood for the cotangent."""
    for function in (one, other):
        ours, theirs = (eager_gradient(scan, function) for scan in (bptt_jax.scan, lax.scan))
        comparison.assert_same(ours, theirs, tolerance=1e-12)


def test_settings_are_part_of_the_match():
    """The same equations under another setting of JAX are another step."""
    seen = []
    for precision in (None, "highest", None):
        with jax.default_matmul_precision(precision):
            seen.append(eager_gradient(bptt_jax.scan, jnp.tanh))
    comparison.assert_same(seen[0], seen[2], tolerance=0)
    init, xs = INIT.astype(np.float32), XS.astype(np.float32)
    for in_double in (True, False, True):
        with jax.enable_x64(in_double):
            found, theirs = (
                jax.grad(lambda init, scan=scan: scan(lambda c, x: (jnp.sin(c * x), None), init, xs)[0].sum())(init)
                for scan in (bptt_jax.scan, lax.scan)
            )
        comparison.assert_same(found, theirs, tolerance=1e-6)


@pytest.mark.slow
def test_calls_do_not_pile_up():
    """A loop of eager gradients, each of a new step: no growth of memory, also for steps with a callback."""

    def steps():
        gc.collect()
        return sum(isinstance(one, FlatStep) for one in gc.get_objects())

    for scan in (bptt_jax.scan, functools.partial(bptt_jax.scan, budget="12kB")):
        eager_gradient(scan, jnp.tanh)
        before = steps()
        for _ in range(20):
            eager_gradient(scan, jnp.tanh)
        assert steps() <= before


@pytest.mark.parametrize("mapped", [False, True])
def test_each_call_is_warned(mapped):
    """A percentage that cannot be kept: a second call of an equal step is warned as well."""
    init = np.stack([INIT, INIT]) if mapped else INIT
    for _ in range(2):
        scan = functools.partial(bptt_jax.scan, lambda c, x: (jnp.sin(c + x), None), xs=XS, budget="1%")
        gradient = jax.grad(lambda init, scan=scan: scan(init)[0][0])
        with pytest.warns(bptt_jax.errors.BudgetWarning, match="the smallest plan runs"):
            (jax.vmap(jax.jit(gradient)) if mapped else gradient)(init)
