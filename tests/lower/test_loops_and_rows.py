"""The loops over a block's steps, and its products as products of rows: values, types on meshes, callbacks, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bptt_jax
from bptt_jax._bench.cells import CELLS
from bptt_jax._bench.peers import compile_program
from bptt_jax._device.machine import Machine
from bptt_jax._step import rows
from bptt_jax._step.form import sweep_forms
from bptt_jax._trace.gradient import gradient_of
from bptt_jax._trace.trace import trace
from tests.support import comparison, forms
from tests.support.steps import normal

HAS_ROWS = {
    "rank 1": ((4,), (4, 5), (((0,), (0,)), ((), ()))),
    "rank 2": ((3, 4), (4, 5), (((1,), (0,)), ((), ()))),
    "rank 3": ((2, 3, 4), (4, 5), (((2,), (0,)), ((), ()))),
    "transposed weight": ((3, 4), (5, 4), (((1,), (1,)), ((), ()))),
    "two axes, crossed": ((3, 4, 6), (6, 5, 4), (((2, 1), (0, 2)), ((), ()))),
}
HAS_NONE = {
    "contracted first": ((4, 3), (4, 5), (((0,), (0,)), ((), ()))),
    "batch": ((2, 3, 4), (2, 4, 5), (((2,), (1,)), ((0,), (0,)))),
}


@pytest.mark.parametrize("name", [*HAS_ROWS, *HAS_NONE])
def test_a_product_of_a_block_is_that_of_each_step(name):
    left_shape, weight_shape, numbers = (HAS_ROWS | HAS_NONE)[name]
    left, weight = normal(0, 6, *left_shape), normal(1, *weight_shape)

    def each(left, weight):
        return jax.vmap(lambda left: lax.dot_general(left, weight, numbers))(left)

    (eqn,) = jax.make_jaxpr(lambda left, weight: lax.dot_general(left, weight, numbers))(left[0], weight).eqns

    def block(left, weight):
        return rows.product(eqn, 1, left, weight)

    ours, theirs = (jax.vjp(run, left, weight) for run in (block, each))
    cotangents = jnp.cos(jnp.arange(theirs[0].size, dtype=left.dtype)).reshape(theirs[0].shape)
    comparison.assert_same((ours[0], ours[1](cotangents)), (theirs[0], theirs[1](cotangents)), 1e-12)
    products = [e for e in jax.make_jaxpr(block)(left, weight).eqns if e.primitive.name == "dot_general"]
    assert [e.invars[0].aval.ndim == 1 + len(numbers[0][0]) for e in products] == [name in HAS_ROWS]


def test_there_is_no_copy_of_cotangents():
    """As products under `jax.vmap`, the gradient of a weight has a transposed one."""
    types = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((40, 16, 64), (64, 256), (40, 16, 256))]
    (eqn,) = jax.make_jaxpr(jnp.matmul)(types[0].update(shape=(16, 64)), types[1]).eqns

    def taken(product):
        def gradient(left, weight, cotangents):
            made = lax.scan(lambda c, ct: (jnp.sin(c) + ct, jnp.cos(c)), cotangents[0], cotangents)[1]
            return jax.linear_transpose(lambda weight: product(left, weight), weight)(made)

        return jax.jit(gradient).lower(*types).compile().memory_analysis().temp_size_in_bytes

    each = taken(lambda left, weight: jax.vmap(lambda left: left @ weight)(left))
    cotangent_bytes = types[2].size * 4
    assert taken(lambda left, weight: rows.product(eqn, 1, left, weight)) <= each - 0.9 * cotangent_bytes


def form_of(step, init, xs):
    found = []

    def inspect(init, xs):
        traced = trace(step, init, xs, None, False, None, bptt_jax._options.checked_options())
        gradient = gradient_of(traced.call, traced.arguments)
        found.append(sweep_forms(gradient.call.step, gradient.active, gradient.call.options.machine))

    jax.eval_shape(inspect, init, xs)
    return found[0]


W, V, INIT, XS = (np.random.default_rng(0).normal(size=size) for size in ((4, 4), (4, 4), (2, 4), (20, 2, 4)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("plan", ["20", "(2*[8] + 4)", "(19*[1] + 1)"])
def test_features_read_ahead(plan, reverse):
    def loss(scan, w, v, init, xs):
        def step(carry, x):
            carry = jnp.tanh(x @ w + carry @ v)
            return carry, jnp.sin(carry)

        assert scan is lax.scan or form_of(step, init, xs)[0].parts.reads_ahead
        carry, ys = scan(step, init, xs, reverse=reverse)
        return jnp.sum(carry**2) + jnp.sum(ys * jnp.cos(xs))

    def gradient(scan):
        return jax.value_and_grad(lambda *given: loss(scan, *given), (0, 1, 2, 3))(W, V, INIT, XS)

    def ours(*arguments, **options):
        return bptt_jax.scan(*arguments, plan=plan, **options)

    comparison.assert_same(gradient(ours), gradient(lax.scan), 1e-12)


def test_features_that_are_only_added_are_not_read_ahead():
    assert not form_of(lambda carry, x: (carry + x @ W, None), INIT, XS)[0].parts.reads_ahead


@pytest.mark.usefixtures("implicit_broadcasting")
@pytest.mark.parametrize("shape", [(8,), (1, 8)])
def test_a_bias_held_whole_is_added_to_an_axis_that_a_mesh_divides(shape):
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,))

    def put(leaf, *axes):
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    def gradient(scan):
        def loss(h, xs, bias):
            return jnp.sum(scan(lambda c, x: (jnp.tanh(c + x + bias), None), h, xs)[0])

        return jax.jit(jax.grad(loss, (0, 1, 2)))

    with jax.set_mesh(mesh):
        given = (
            put(normal(6, 3, 8), None, "model"),
            put(normal(7, 20, 3, 8), None, None, "model"),
            put(normal(8, *shape)),
        )
        comparison.assert_same(gradient(bptt_jax.scan)(*given), gradient(lax.scan)(*given), 1e-12)


def test_two_carries_that_vary_over_other_axes_of_a_mesh():
    """The index of a block outside of loops waits for the carry; it must not hand its variation to the other one."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))

    def gradient(scan):
        def inner(h, g, xs, w):
            def step(carry, x):
                h, g = carry
                return (jnp.tanh(x @ w + h @ w), jnp.tanh(x @ w + g @ w)), None

            (h, g), _ = scan(step, (h[0], g), xs)
            return h[None], g

        specs = (PartitionSpec("i"), PartitionSpec(), PartitionSpec(), PartitionSpec())
        mapped = jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=specs[:2])
        return jax.jit(jax.grad(lambda *given: sum(map(jnp.sum, mapped(*given))), (0, 1, 2, 3)))

    given = normal(9, 1, 2, 4), normal(10, 2, 4), normal(11, 97, 2, 4), 0.3 * W  # two blocks, for 97 is prime
    comparison.assert_same(gradient(bptt_jax.scan)(*given), gradient(lax.scan)(*given), 1e-12)


def test_an_inner_loop_of_unknown_length_is_exported():
    def run(scan, init, xs):
        def step(carry, x):
            total, _ = lax.scan(lambda total, v: (total + jnp.sin(v), None), jnp.zeros((), carry.dtype), carry)
            return jnp.tanh(carry * total + x), total

        return jnp.sum(scan(step, init, xs)[0])

    (size,) = export.symbolic_shape("size")
    types = jax.ShapeDtypeStruct((size,), jnp.float64), jax.ShapeDtypeStruct((7, size), jnp.float64)
    exported = export.export(jax.jit(lambda *given: run(bptt_jax.scan, *given)))(*types)
    given = normal(12, 3), normal(13, 7, 3)
    np.testing.assert_allclose(exported.call(*given), run(lax.scan, *given), rtol=1e-12)


def test_inner_loops_count_with_all_their_iterations():
    machine = Machine("gpu")

    def most(length):
        def step(carry, x):
            return lax.fori_loop(0, length, lambda _, c: jnp.sin(c), carry) + x, None

        found = []

        def inspect(init, xs):
            traced = trace(step, init, xs, None, False, None, bptt_jax._options.checked_options())
            found.append(bptt_jax._lower.loop._most_together(traced.call.step, machine))

        jax.eval_shape(inspect, jnp.zeros((256, 256)), jnp.zeros((3, 256, 256)))
        return found[0]

    assert (most(2), most(200)) == (4, 1)


def test_a_callback_in_the_backward_pass_runs_once_a_step():
    """The types of a block's results are found by evaluating one step, without callbacks."""
    seen = []

    def seeing(carry, z):
        jax.debug.callback(seen.append, carry[0, 0])
        return jnp.tanh(carry @ W + z)

    def step(carry, x):
        z = x @ V
        carry = jax.checkpoint(lambda c, z: (jax.debug.callback(seen.append, c[0, 0]), jnp.tanh(c @ W + z))[1])(
            carry, z
        )
        return jax.checkpoint(lambda c: jnp.sin(jnp.sin(c)))(carry), None

    def count(scan):
        seen.clear()
        with bptt_jax.show_recomputation():
            jax.block_until_ready(jax.jit(jax.grad(lambda init: jnp.sum(scan(step, init, XS)[0])))(INIT))
        jax.effects_barrier()
        return len(seen)

    assert count(bptt_jax.scan) == count(lax.scan)


def test_features_take_no_more_bytes(monkeypatch):
    """Room for cotangents is made when features are gone, and those of the last block when the loop before is done."""
    problem = CELLS["lstm"](16, 64)

    def taken(style):
        forms.force(monkeypatch, style)

        def scan(step, init, xs):
            return bptt_jax.scan(step, init, xs, plan="(4*[40] + 40)")

        return compile_program("", scan, problem, problem.xs_shape(200)).temp_bytes

    with_features, without = (taken(forms.Style(merged=False, features=given)) for given in (True, False))
    assert with_features <= 1.02 * without
