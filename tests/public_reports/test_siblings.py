"""Siblings of the public reports: situations of the same kinds that nobody has reported yet."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax

import bptt_jax
from tests.support import comparison

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
INIT, XS = np.random.default_rng(0).normal(size=8), np.random.default_rng(1).normal(size=(40, 8))
WAYS = [{}, {"budget": "200%"}, {"plan": "(4*[10])"}, {"plan": "(4*[10])", "lowering": "nested"}]


def step(carry, x):
    carry = jnp.tanh(carry + x)
    return carry, carry


def test_keywords_of_profile_partials_and_layers():
    """Names of arguments, in `profile`, `functools.partial`, and calls of layers."""
    assert bptt_jax.profile(f=step, init=INIT, x=XS[0]).carry_bytes == INIT.nbytes
    ours, theirs = (functools.partial(scan, f=step, xs=XS)(init=INIT) for scan in (bptt_jax.scan, lax.scan))
    comparison.assert_same(ours, theirs, tolerance=1e-12)
    layer, inputs = bptt_jax.linen.RNN(nn.GRUCell(4)), jnp.ones((2, 9, 3), jnp.float32)
    assert layer.apply(layer.init(jax.random.key(0), inputs=inputs), inputs=inputs).shape == (2, 9, 4)
    assert bptt_jax.nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)))(inputs=inputs).shape == (2, 9, 4)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", WAYS[:3], ids=str)
def test_without_jit(options):
    """`jax.disable_jit`: other axes of time, a length alone, decorators, second derivatives, vmap, NNX, `explain`."""
    with jax.disable_jit():
        _, ys = bptt_jax.scan(step, INIT, XS.T, in_axes=1, out_axes=1, **options)
        comparison.assert_same(ys.T, lax.scan(step, INIT, XS)[1], tolerance=1e-12)
        for scan in (functools.partial(bptt_jax.scan, **options), lax.scan):
            counted = scan(lambda carry, _: (1.1 * carry, int(carry[0] > 0)), INIT, None, 5)[1]
            assert counted.tolist() == [int(INIT[0] > 0)] * 5
        run = bptt_jax.checkpointed(step, **options)
        comparison.assert_same(run(INIT, XS)[1], lax.scan(step, INIT, XS)[1], tolerance=1e-12)
        short = [jax.hessian(lambda i, scan=scan: scan(step, i, XS[:4])[0].sum()) for scan in (bptt_jax.scan, lax.scan)]
        comparison.assert_same(short[0](INIT), short[1](INIT), tolerance=1e-12)
        mapped = jax.vmap(jax.grad(lambda i: bptt_jax.scan(step, i, XS, **options)[0].sum()))(np.stack([INIT, INIT]))
        assert mapped.shape == (2, 8)
        layer = bptt_jax.nnx.RNN(nnx.GRUCell(8, 4, rngs=nnx.Rngs(0)), **options)
        nnx.grad(lambda layer: layer(XS[None].astype(np.float32)).sum())(layer)
        report = bptt_jax.explain(step, INIT, XS, **options)
        assert list(bptt_jax.explain_calls(lambda init: bptt_jax.scan(step, init, XS)[0], INIT)) == ["scan"]
    assert bptt_jax.plans.length(report.plan) == 40


class Box:
    """A pytree that converts its leaf, for xs, ys and parameters."""

    def __init__(self, value):
        self.value = jnp.asarray(value)


jax.tree_util.register_pytree_node(Box, lambda box: ((box.value,), None), lambda _, leaves: Box(*leaves))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    """A dataclass that converts after its initialisation."""

    value: jax.Array

    def __post_init__(self):
        self.value = jnp.asarray(self.value)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("kind", [Box, Record])
def test_xs_ys_and_params_whose_class_converts(kind, options):
    """Not only a carry: xs and ys along other axes, the parameters of a decorator, under vmap, in `explain_calls`."""

    def boxed(carry, x):
        carry = jnp.tanh(carry + x.value)
        return carry, kind(carry)

    def gradient(scan):
        def loss(xs):
            carry, ys = scan(boxed, INIT, kind(xs))
            return jnp.sum(carry) + jnp.sum(jnp.sin(ys.value))

        return jax.vmap(jax.grad(loss))(np.stack([XS, 2 * XS]))

    ours = functools.partial(bptt_jax.scan, **options)
    comparison.assert_same(gradient(ours), gradient(lax.scan), tolerance=1e-12)
    _, ys = bptt_jax.scan(boxed, INIT, kind(XS.T), in_axes=1, out_axes=1, **options)
    comparison.assert_same(ys.value.T, lax.scan(boxed, INIT, kind(XS))[1].value, tolerance=1e-12)

    @bptt_jax.checkpointed(params=True, **options)
    def run(params, carry, x):
        return jnp.tanh(params.value * carry + x), None

    assert jax.grad(lambda gain: run(kind(gain), INIT, XS)[0].sum())(jnp.ones(8)).shape == (8,)
    assert len(bptt_jax.explain_calls(lambda box: run(box, INIT, XS)[0], kind(np.ones(8)))) == 1


def test_steps_that_fail_in_a_layer_or_with_another_carry():
    """A cell with a mistake, and a step whose carry changes its shape, are called once."""
    calls = []

    class Cell(nn.GRUCell):
        def __call__(self, carry, inputs):
            calls.append(1)
            raise KeyError("mistake")

    with pytest.raises(KeyError, match="mistake"):
        bptt_jax.linen.RNN(Cell(3), budget="50%").init(jax.random.key(0), jnp.ones((2, 5, 3), jnp.float32))
    assert len(calls) == 1

    def shrinks(carry, x):
        calls.append(1)
        return carry[:3], None

    for scan in (bptt_jax.scan, bptt_jax.explain, jax.jit(bptt_jax.scan, static_argnums=0), lax.scan):
        calls.clear()
        with pytest.raises(TypeError, match="carry"):
            scan(shrinks, INIT, XS)
        assert len(calls) <= 1  # JAX remembers traces, so a later scan may not call it again


def test_nothing_leaks_from_decorators_second_derivatives_and_reports():
    """`jax.checking_leaks` around a decorator under vmap, a Hessian, reverse over reverse, and `explain_calls`."""
    run = bptt_jax.checkpointed(step, plan="(4*[10])")

    def loss(init):
        return run(init, XS)[0].sum()

    with jax.checking_leaks():
        jax.vmap(jax.grad(loss))(np.stack([INIT, INIT]))
        jax.hessian(loss)(INIT)
        jax.grad(lambda init: jnp.sum(jax.grad(loss)(init) ** 2))(INIT)
        bptt_jax.explain_calls(jax.grad(loss), INIT)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_references_that_are_read_or_the_steps_own(options):
    """A reference that the step reads, and one that it makes and gives up itself."""

    def read(scan):
        ref = jax.new_ref(2 * jnp.ones(8))
        return scan(lambda carry, x: (jnp.tanh(carry * ref[...] + x), None), INIT, XS)[0]

    def own(carry, x):
        ref = jax.new_ref(carry)
        ref[...] = jnp.tanh(ref[...] + x)
        return jax.freeze(ref), None

    ours = functools.partial(bptt_jax.scan, **options)
    comparison.assert_same(read(ours), read(lax.scan), tolerance=1e-12)
    comparison.assert_same(ours(own, INIT, XS)[0], lax.scan(own, INIT, XS)[0], tolerance=1e-12)
    gradients = [jax.grad(lambda init, scan=scan: scan(own, init, XS)[0].sum()) for scan in (ours, lax.scan)]
    if options:
        with pytest.raises(NotImplementedError, match=r"effects \(references\)"):
            gradients[0](INIT)
    else:
        comparison.assert_same(gradients[0](INIT), gradients[1](INIT), tolerance=1e-12)


@pytest.mark.parametrize("differentiated", [False, True])
def test_an_export_for_any_length(differentiated):
    """`jax.export` with a symbolic number of steps, as `jax.lax.scan` has it; with a plan or a budget an error."""

    def program(scan):
        def run(xs):
            return scan(step, jnp.zeros(8), xs)[0].sum()

        return jax.jit(jax.grad(run) if differentiated else run)

    any_length = jax.ShapeDtypeStruct((*export.symbolic_shape("steps"), 8), jnp.float64)
    exported = export.export(program(bptt_jax.scan))(any_length)
    for length in (3, 40):
        comparison.assert_same(exported.call(XS[:length]), program(lax.scan)(XS[:length]), tolerance=1e-12)
    for options in WAYS[1:3]:
        with pytest.raises(ValueError, match=r"number of steps is not known.*leave out budget= and plan="):
            export.export(program(functools.partial(bptt_jax.scan, **options)))(any_length)


def test_an_export_of_an_nnx_layer_for_any_batch():
    """As of a Linen layer."""
    graphdef, state = nnx.split(bptt_jax.nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), plan="(3*[3])"))
    any_batch = jax.ShapeDtypeStruct((*export.symbolic_shape("batch"), 9, 3), jnp.float32)
    exported = export.export(jax.jit(lambda state, xs: nnx.merge(graphdef, state)(xs)))(state, any_batch)
    xs = jnp.ones((5, 9, 3), jnp.float32)
    comparison.assert_same(exported.call(state, xs), nnx.merge(graphdef, state)(xs), tolerance=1e-6)


def _while(carry, x):
    return lax.while_loop(lambda c: jnp.sum(c[0]) < 3, lambda c: (c[0] + 1, c[1]), (carry, x))[0], None


def _for(carry, x):
    return lax.fori_loop(0, jnp.int32(x[0]), lambda i, c: jnp.sin(c), carry), None


def _branch(carry, x):
    return lax.cond(x[0] > 0, lambda c: _while(c, x)[0], lambda c: c, carry), None


@pytest.mark.parametrize("options", [*WAYS, {"budget": 10_000}], ids=str)
@pytest.mark.parametrize("loop", [_while, _for, _branch])
def test_loops_without_reverse_mode(loop, options):
    """Dynamic `fori_loop`s and loops in branches: JAX's error in reverse mode, and forward mode as in JAX."""
    ours = functools.partial(bptt_jax.scan, **options)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda init: ours(loop, init, XS)[0].sum())(INIT)
    jvps = [jax.jvp(lambda init, scan=scan: scan(loop, init, XS)[0], (INIT,), (INIT,)) for scan in (ours, lax.scan)]
    comparison.assert_same(*jvps, tolerance=1e-12)
