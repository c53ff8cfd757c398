"""Time along any axis, in either direction, and of each sequence its own: results are those of moved arrays."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from bptt_jax._options import checked_options
from bptt_jax._scan import scan_along
from bptt_jax._trace.along import Along, Layout
from tests.measure.test_bytes import temporaries
from tests.scan.test_transformations import WAYS, in_a_way, reference, result_of, rows
from tests.support import comparison

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
LENGTH, BATCH = 11, 3
LENGTHS = (LENGTH, 1, 7)
PLANS = {
    "none": None,
    "deep": Chain((Repeat(2, Remat(Chain((Repeat(2, Remat(Steps(2))), Steps(1))))), Steps(1))),
    "steps": Repeat(LENGTH, Remat(Steps(1))),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def time_last(scan):
    """A scan of arrays with time first, by one of arrays with time last."""

    def move(tree, source, destination):
        return jax.tree.map(lambda leaf: jnp.moveaxis(jnp.asarray(leaf), source, destination), tree)

    def run(f, init, xs=None, length=None, **options):
        carry, ys = scan(f, init, move(xs, 0, -1), length, in_axes=-1, out_axes=-1, **options)
        return carry, move(ys, -1, 0)

    return run


# The planned ways look for a length along the first axis.
@pytest.mark.one_in(23)
@pytest.mark.parametrize(
    ("row", "name", "lowering", "limit"), [row for row in rows() if row[3] != "plan"][::3], ids=str
)
def test_every_transformation_with_time_last(row, name, lowering, limit):
    ours = in_a_way(lambda scan: result_of(row, time_last(scan), name), lowering, limit)
    comparison.assert_same(ours, reference(row, name), tolerance=1e-9)


def step(w, h, x):
    h = jnp.tanh(h @ w + x["inputs"] * x["scale"])
    return h, {"state": h, "norm": jnp.sum(h**2, -1)}


def arguments():
    """A weight, a first carry, and xs with time along axis 1 of one leaf and the last of another."""
    return normal(0, 4, 4), normal(1, BATCH, 4), {"inputs": normal(2, BATCH, LENGTH, 4), "scale": normal(3, 4, LENGTH)}


AXES = {"inputs": 1, "scale": -1}
OUT_AXES = {"state": 1, "norm": -1}


def loss_of(scan, w, init, xs):
    carry, ys = scan(functools.partial(step, w), init, xs)
    assert ys["state"].shape == (BATCH, LENGTH, 4)
    return jnp.sum(jnp.sin(carry)) + jnp.sum(ys["state"] * jnp.cos(jnp.arange(LENGTH))[:, None]) + jnp.sum(ys["norm"])


def moved(f, init, xs, reverse=False):
    """By `jax.lax.scan`, of whole arrays that are moved."""
    xs = {name: jnp.moveaxis(leaf, AXES[name], 0) for name, leaf in xs.items()}
    carry, ys = lax.scan(f, init, xs, reverse=reverse)
    return carry, {name: jnp.moveaxis(leaf, 0, OUT_AXES[name]) for name, leaf in ys.items()}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("lowering", [None, "nested"])
def test_a_pytree_of_axes(lowering, plan, reverse):
    ours = functools.partial(bptt_jax.scan, in_axes=AXES, out_axes=OUT_AXES, lowering=lowering, plan=PLANS[plan])

    def results(scan):
        loss = functools.partial(loss_of, functools.partial(scan, reverse=reverse))
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        of_weights = jax.jit(jax.grad(loss))
        second = jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(jax.grad(loss)(w, *arguments()[1:])))))
        return gradient(*arguments()), of_weights(*arguments()), second(arguments()[0]), jax.jit(loss)(*arguments())

    comparison.assert_same(results(ours), results(moved), tolerance=1e-9)


def test_decorated_and_with_jit_disabled():
    run = bptt_jax.checkpointed(functools.partial(step, arguments()[0]), in_axes=AXES, out_axes=OUT_AXES)
    theirs = moved(functools.partial(step, arguments()[0]), *arguments()[1:])
    comparison.assert_same(run(*arguments()[1:]), theirs, tolerance=1e-9)
    with jax.disable_jit():
        comparison.assert_same(run(*arguments()[1:]), theirs, tolerance=1e-9)


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("lowering", [None, "nested"])
def test_no_steps_and_one(lowering, length):
    ours = functools.partial(bptt_jax.scan, in_axes=1, out_axes=1, lowering=lowering)

    def results(scan):
        def loss(w, xs):
            carry, ys = scan(lambda h, x: (jnp.tanh(h @ w + x),) * 2, jnp.ones((BATCH, 4)), xs)
            return jnp.sum(jnp.sin(carry)) + jnp.sum(ys), ys

        w, xs = normal(0, 4, 4), normal(1, BATCH, length, 4)
        return loss(w, xs), jax.grad(loss, has_aux=True)(w, xs), jax.grad(loss, (0, 1), has_aux=True)(w, xs)

    def theirs(f, init, xs):
        carry, ys = lax.scan(f, init, jnp.moveaxis(xs, 1, 0))
        return carry, jnp.moveaxis(ys, 0, 1)

    comparison.assert_same(results(ours), results(theirs), tolerance=1e-12)


def test_outputs_that_are_inputs():
    """JAX takes them out of the loop; and those that two results share."""

    def both(c, x):
        return c + x, (x, c, c)

    xs = normal(0, 4, LENGTH)
    _, (same, before, again) = bptt_jax.scan(both, jnp.zeros(4), xs, in_axes=1, out_axes=(1, 1, 0))
    np.testing.assert_array_equal(same, xs)
    np.testing.assert_allclose(before, jnp.cumsum(xs, 1) - xs, atol=1e-12)
    np.testing.assert_array_equal(again, before.T)


def test_keys_along_another_axis():
    keys = jax.random.split(jax.random.key(0), (BATCH, LENGTH))

    def draw(h, key):
        h = h + jax.vmap(jax.random.normal)(key)
        return h, key

    carry, ys = bptt_jax.scan(draw, jnp.zeros(BATCH), keys, in_axes=1, out_axes=1)
    theirs, _ = lax.scan(draw, jnp.zeros(BATCH), jnp.moveaxis(keys, 1, 0))
    np.testing.assert_array_equal(carry, theirs)
    assert ys.shape == (BATCH, LENGTH)
    gradient = jax.grad(lambda init: bptt_jax.scan(draw, init, keys, in_axes=1, plan=PLANS["deep"])[0].sum())
    np.testing.assert_array_equal(gradient(jnp.zeros(BATCH)), jnp.ones(BATCH))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"in_axes": 3}, r"in_axes has 3 for a leaf of xs with 2 axes"),
        ({"in_axes": True}, r"in_axes has True"),
        ({"in_axes": False}, r"in_axes has False"),
        ({"in_axes": 0.0}, r"in_axes has 0.0"),
        ({"in_axes": {"b": 0}}, r"in_axes must be an int, or a pytree of ints that begins like xs"),
        ({"out_axes": -3}, r"out_axes has -3 for a leaf of ys with 2 axes"),
        ({"out_axes": (0, 1)}, r"out_axes must be an int, or a pytree of ints that begins like ys"),
    ],
)
def test_axes_that_do_not_fit(axes, message):
    for run in (bptt_jax.scan, bptt_jax.explain):
        with pytest.raises(ValueError, match=message):
            run(lambda c, x: (c + x["a"], c), jnp.zeros(4), {"a": jnp.zeros((4, 4))}, **axes)


def test_an_audit_of_it_says_the_same_as_scan():
    """`explain` with axes compiles what `scan` with them runs."""
    w, init, xs = arguments()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (init, xs))
    report = bptt_jax.explain(functools.partial(step, w), *shapes, in_axes=AXES, out_axes=OUT_AXES, plan=PLANS["deep"])
    assert report.plan == PLANS["deep"]
    assert report.measured_bytes > 0


@pytest.mark.one_in(9)
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("of_x", "of_y"), [(32, 32), (96, 32), (32, 96)])
@pytest.mark.parametrize("budget", [307_200, 380_000, 500_000])
def test_outputs_and_inputs_along_another_axis_are_within_the_budget(budget, of_x, of_y, axis):
    """With a last block at a fixed place: a user's program was 3 % over."""
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    weights = f32((32, 32)), f32((of_x, 32)), f32((32, of_y))

    def gradient(weights, init, xs, cotangents):
        def run(weights, init, xs):
            own, of_inputs, of_outputs = weights

            def body(c, x):
                c = jnp.tanh(c @ own + x @ of_inputs)
                return c, jnp.sin(c @ of_outputs)

            return bptt_jax.scan(body, init, xs, budget=budget, in_axes=axis, out_axes=axis)

        outs, pull = jax.vjp(run, weights, init, xs)
        return outs, pull(cotangents)

    init, shape = f32((4, 3, 32)), [4, 3]
    shape.insert(axis, 200)
    xs, ys = f32((*shape, of_x)), f32((*shape, of_y))
    assert temporaries(gradient, weights, init, xs, (init, ys)) <= budget


# Sequences of several lengths


def flipped(xs, lengths, axis):
    """Each sequence backwards and then its padding backwards, by NumPy's rules and one sequence at a time."""
    found = np.array(xs)
    for i, n in enumerate(np.asarray(lengths)):
        sequence = np.moveaxis(np.array(xs[i]), axis - 1, 0)
        both = np.concatenate([sequence[:n][::-1], sequence[n:][::-1]])
        found[i] = np.moveaxis(both, 0, axis - 1)
    return found


@pytest.mark.parametrize("axis", [1, 2])
def test_each_sequence_is_read_from_its_own_end(axis):
    xs, lengths = normal(0, BATCH, *((LENGTH, 4) if axis == 1 else (4, LENGTH))), jnp.array(LENGTHS, jnp.int32)
    along = Along(axis, batch_axes=(0,))
    whole = along.whole(xs, lengths)
    np.testing.assert_array_equal(whole, np.moveaxis(flipped(xs, lengths, axis), axis, 0))
    np.testing.assert_array_equal(along.back(whole, lengths), xs)
    for start, n in ((0, 3), (4, 1), (8, 3)):
        block = whole[start : start + n]
        np.testing.assert_array_equal(along.read(xs, start, n, lengths), block)
        wanted = along.back(jnp.zeros_like(whole).at[start : start + n].set(block), lengths)
        np.testing.assert_array_equal(along.write(jnp.zeros_like(xs), block, start, lengths), wanted)


def with_lengths(keep_order, options, w, init, xs, lengths):
    """Of (batch, time, features), backwards by the lengths."""
    of_xs = Along(1, batch_axes=(0,))
    layout = Layout(of_xs, of_xs if keep_order else Along(1), lengths)

    def body(h, x):
        h = jnp.tanh(h @ w + x)
        return h, jnp.sin(h)

    return scan_along(body, init, xs, None, False, 1, options, layout)


def by_lax(keep_order, w, init, xs, lengths):
    def body(h, x):
        h = jnp.tanh(h @ w + x)
        return h, jnp.sin(h)

    def flip(a):
        places = (jnp.arange(LENGTH - 1, -1, -1)[None] + lengths[:, None]) % LENGTH
        return jnp.take_along_axis(a, places[..., None], axis=1)

    carry, ys = lax.scan(body, init, jnp.moveaxis(flip(xs), 1, 0))
    ys = jnp.moveaxis(ys, 0, 1)
    return carry, flip(ys) if keep_order else ys


def gradient(axes, run, w, init, xs, lengths):
    """Of examples with their own of what has an axis, or of one."""

    def loss(w, init, xs, lengths):
        carry, ys = run(w, init, xs, lengths)
        return jnp.sum(jnp.sin(carry)) + jnp.sum(ys * jnp.cos(jnp.arange(LENGTH))[:, None])

    one = jax.value_and_grad(loss, (0, 1, 2))
    if axes is None:
        of_one = functools.partial(loss, init=init, xs=xs, lengths=lengths)
        second = jax.grad(lambda w: jnp.sum(jnp.sin(jax.grad(of_one)(w))))(w)
        return one(w, init, xs, lengths), second, run(w, init, xs, lengths)
    several = [
        a if axis is None else jnp.stack([a, a * 0.5, -a], axis)
        for a, axis in zip((w, init, xs), axes[:3], strict=True)
    ]
    lengths = lengths if axes[3] is None else jnp.stack([lengths, lengths[::-1], lengths % LENGTH + 1], axes[3])
    total = jax.grad(lambda *given: jax.vmap(loss, axes)(*given, lengths).sum(), (0, 1, 2))(*several)
    mapped = [jax.vmap(f, axes)(*several, lengths) for f in (one, jax.jit(one), run)]
    return total, mapped


MAPPED = [None, (None, None, 0, None), (None, None, 2, 0), (None, 0, None, 1), (0, None, None, None), (0, 1, 1, 1)]


@pytest.mark.one_in(23)
@pytest.mark.parametrize(
    ("axes", "keep_order", "lowering", "plan"),
    list(itertools.product(MAPPED, (False, True), (None, "nested"), ("none", "deep"))),
)
def test_gradients_of_sequences_of_several_lengths(axes, keep_order, lowering, plan):
    options = checked_options(lowering=lowering, plan=PLANS[plan])
    given = normal(0, 4, 4), normal(1, BATCH, 4), normal(2, BATCH, LENGTH, 4), jnp.array(LENGTHS, jnp.int32)
    ours = gradient(axes, functools.partial(with_lengths, keep_order, options), *given)
    theirs = gradient(axes, functools.partial(by_lax, keep_order), *given)
    comparison.assert_same(ours, theirs, tolerance=1e-9)


@pytest.mark.parametrize(("lowering", "limit"), [way for way in WAYS if way[1] == "budget"])
def test_flips_and_blocks_within_a_budget(lowering, limit):
    """Leaves in both directions of one scan."""
    w, init, xs = normal(0, 4, 4), normal(1, BATCH, 4), normal(2, BATCH, LENGTH, 4)

    def ours(budget, w, xs):
        options = checked_options(budget=budget, lowering=lowering, verify=False)
        layout = Layout((Along(1), Along(1, flipped=True)), Along(1, flipped=True))
        return scan_along(
            lambda h, x: (jnp.tanh(h @ w + x[0] * x[1]),) * 2, init, (xs, xs), None, True, 1, options, layout
        )

    def theirs(w, xs):
        both = jnp.moveaxis(xs, 1, 0), jnp.moveaxis(xs, 1, 0)[::-1]
        carry, ys = lax.scan(lambda h, x: (jnp.tanh(h @ w + x[0] * x[1]),) * 2, init, both, reverse=True)
        return carry, jnp.moveaxis(ys[::-1], 0, 1)

    def results(run):
        def loss(w, xs):
            carry, ys = run(w, xs)
            return jnp.sum(carry) + jnp.sum(ys * jnp.cos(jnp.arange(LENGTH))[:, None])

        return jax.value_and_grad(loss, (0, 1))(w, xs)

    found, _ = comparison.in_smallest_budget(lambda budget: results(functools.partial(ours, budget)))
    comparison.assert_same(found, results(theirs), tolerance=1e-9)
