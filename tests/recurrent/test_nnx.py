"""The Flax NNX layers: results, state and gradients of `flax.nnx.RNN`."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import bptt_jax
from tests.support import comparison
from tests.support.nnx_cells import DOUBLE, Busy, Counter, Elman, assert_equal, inputs, outcome, pair

CELLS = [nnx.SimpleCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell]


@pytest.fixture(autouse=True)
def flax_promotion():
    """Flax's initialisers mix dtypes under x64."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")


@pytest.mark.parametrize("cell_class", CELLS)
def test_equals_flax(cell_class):
    xs, layer_class = inputs(), bptt_jax.nnx.rnn(budget="80%", verify=False, return_carry=True)(cell_class)
    arguments = {"dtype": jnp.float64, **DOUBLE}
    theirs = outcome(nnx.RNN(cell_class(5, 7, rngs=nnx.Rngs(0), **arguments), return_carry=True), xs)
    ours = outcome(layer_class(5, 7, rngs=nnx.Rngs(0), **arguments), xs)
    comparison.assert_same(ours, theirs, tolerance=1e-10)


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"time_major": True, "reverse": True, "return_carry": True}, {}),
        ({"unroll": 2, "keep_order": True}, {"reverse": True, "time_major": True}),
        ({}, {"reverse": True, "keep_order": True, "return_carry": True, "time_major": False, "initial_carry": 1}),
    ],
)
def test_options_of_the_constructor_and_of_the_call(options, call):
    time_major = call.get("time_major", options.get("time_major", False))
    xs = inputs(30, 2, 3, 5) if time_major else inputs(2, 3, 30, 5)
    if "initial_carry" in call:
        call = {**call, "initial_carry": jax.random.normal(jax.random.key(2), (2, 3, 4), jnp.float64)}
    assert_equal(Elman.cell_class(4, rngs=nnx.Rngs(0)), xs, call=call, **options)


@pytest.mark.parametrize("flags", [{}, {"reverse": True}, {"reverse": True, "keep_order": True, "time_major": True}])
def test_seq_lengths(flags):
    xs = inputs(30, 3, 5) if flags.get("time_major") else inputs(3, 30, 5)
    call = {"seq_lengths": jnp.array([30, 1, 17]), "return_carry": True, **flags}
    # Busy has state without a batch, of which there is no last one to select.
    cell_class = Elman.cell_class if flags == {"reverse": True} else Busy
    assert_equal(cell_class(4, rngs=nnx.Rngs(0)), xs, "90%", call=call)


def test_resets_restart_the_carry_and_nothing_else():
    xs, at = inputs(), 12
    resets = jnp.zeros((2, 30), bool).at[:, at].set(True)
    ours, theirs = pair(Busy(4, rngs=nnx.Rngs(0)), return_carry=True)
    first = jnp.full((2, 4), 0.25)

    class Halves(nnx.Module):
        """Flax's layer on the parts before and behind the reset."""

        def __init__(self, layer):
            self.layer = layer

        def __call__(self, xs):
            _, before = self.layer(xs[:, :at], initial_carry=first)
            carry, behind = self.layer(xs[:, at:])
            return carry, jnp.concatenate([before, behind], axis=1)

    (result, (gradient, xs_bar)), state = outcome(ours, xs, initial_carry=first, resets=resets)
    (their_result, (their_gradient, their_xs_bar)), their_state = outcome(Halves(theirs), xs)
    comparison.assert_same((result, xs_bar), (their_result, their_xs_bar), tolerance=1e-10)
    comparison.assert_same((gradient, state), (their_gradient["layer"], their_state["layer"]), tolerance=1e-10)
    # Each sequence its own, backwards, and behind them padding: a reset of one step leaves another as it was.
    call = {"seq_lengths": jnp.array([30, 20]), "reverse": True, "return_carry": True}
    one = jnp.zeros((2, 30), bool).at[0, 2].set(True)
    (carry, ys), (plain_carry, plain_ys) = (
        bptt_jax.nnx.RNN(Elman.cell_class(4, rngs=nnx.Rngs(0)))(xs, resets=which, **call) for which in (one, None)
    )
    comparison.assert_same((carry[1], ys["y"][1]), (plain_carry[1], plain_ys["y"][1]), tolerance=1e-12)
    assert float(jnp.abs(carry[0] - plain_carry[0]).max()) > 1e-3


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    ("broadcast_rngs", "budgets"), [(None, [None, "70%", "60%"]), ("dropout", ["60%"]), (nnx.RngKey, ["60%"])]
)
def test_dropout_has_flax_bits_at_every_budget(broadcast_rngs, budgets):
    cell, xs = Busy(4, rngs=nnx.Rngs(0, dropout=3)), inputs()
    layers = [pair(cell, budget, broadcast_rngs=broadcast_rngs) for budget in budgets]
    expected = outcome(layers[0][1], xs)
    for layer, _ in layers:
        comparison.assert_same(outcome(layer, xs), expected, tolerance=1e-10)


def test_keys_and_statistics_of_their_own_for_each_step():
    xs = inputs()
    cell = Busy(4, rngs=nnx.Rngs(0, dropout=3))
    nnx.split_rngs(cell, splits=30, only="dropout")
    cell.norm.mean.set_value(jnp.linspace(-1.0, 1.0, 120).reshape(4, 30))
    axes = nnx.StateAxes({nnx.RngState: 0, nnx.PathContains("mean"): 1, Counter: None, ...: nnx.Carry})
    for flags in ({}, {"reverse": True}):
        _, state = assert_equal(cell, xs, state_axes=axes, **flags)
        assert int(state["cell"]["steps"][...]) == 0  # shared: what a step makes of it is dropped
        assert state["cell"]["norm"]["mean"].shape == (4, 30)


def test_sown_values_are_stacked():
    axes, xs = {nnx.Intermediate: 0, ...: nnx.Carry}, inputs()
    cell = Busy(4, sows=True, rngs=nnx.Rngs(0))
    # Flax's layer takes several filters as StateAxes only.
    layers = bptt_jax.nnx.RNN(nnx.clone(cell), state_axes=axes), nnx.RNN(cell, state_axes=nnx.StateAxes(axes))
    ours, theirs = (nnx.capture(layer, nnx.Intermediate)(xs, reverse=True) for layer in layers)
    comparison.assert_same(ours, theirs, tolerance=1e-12)
    assert ours[1]["cell"]["carries"][0].shape == (30, 2, 4)
    comparison.assert_same(nnx.state(layers[0]), nnx.state(layers[1]), tolerance=1e-12)
    layer = bptt_jax.nnx.RNN(Busy(4, sows=True, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match=r"a step of Busy added or removed .*carries.*nnx\.Carry.*nnx\.Intermediate: 0"
    ):
        nnx.capture(layer, nnx.Intermediate)(xs)


def test_first_carries_are_flax_own():
    cell, xs = Elman.cell_class(4, rngs=nnx.Rngs(0)), inputs()
    layers = [*pair(cell), *pair(cell, rngs=False)]
    layers += [layer_class(nnx.clone(cell), rngs=nnx.Rngs(carry=5)) for layer_class in (bptt_jax.nnx.RNN, nnx.RNN)]

    def drawn(layer, **call):
        return [layer(xs, return_carry=True, **call) for _ in range(2)], nnx.state(layer)

    for ours, theirs in zip(layers[::2], layers[1::2], strict=True):
        given = [nnx.Rngs(carry=7), nnx.Rngs(carry=7)]
        comparison.assert_same(drawn(ours, rngs=given[0]), drawn(theirs, rngs=given[1]), tolerance=1e-12)
        comparison.assert_same(nnx.state(given[0]), nnx.state(given[1]), tolerance=0)
        if theirs.rngs is not None:
            (_, first), (_, second) = results = drawn(ours)[0]
            comparison.assert_same(results, drawn(theirs)[0], tolerance=1e-12)
            assert float(jnp.abs(first["y"] - second["y"]).max()) > 1e-3  # another key each time
    with pytest.raises(ValueError, match="Expected rngs"):
        bptt_jax.nnx.RNN(cell, rngs=3)


class Classifier(nnx.Module):
    def __init__(self, layer_class, *, rngs):
        def layer(n):
            return layer_class(nnx.GRUCell(n, 4, rngs=rngs, **DOUBLE))

        self.layers = nnx.Sequential(nnx.Bidirectional(layer(5), layer(5)), layer(8))
        self.last = layer(4)

    def __call__(self, xs):
        return nnx.remat(lambda layer, xs: layer(xs))(self.last, self.layers(xs))


def trained(model, xs):
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer, xs):
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(xs) - 1.0) ** 2))(model)
        optimizer.update(model, gradient)
        return loss

    losses = [train(model, optimizer, xs) for _ in range(3)]
    return losses, nnx.state(model), nnx.state(optimizer)


def test_trains_in_a_model_as_flax_does():
    ours = trained(Classifier(lambda cell: pair(cell)[0], rngs=nnx.Rngs(0)), inputs())
    theirs = trained(Classifier(nnx.RNN, rngs=nnx.Rngs(0)), inputs())
    comparison.assert_same(ours, theirs, tolerance=1e-10)
    assert ours[0][2] < ours[0][0]


def test_vmap_over_layers():
    def ensemble(layer_class):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return layer_class(Busy(4, rngs=rngs))

        layers, xs = make(nnx.Rngs(0, dropout=3)), inputs(3, 2, 30, 5)

        def loss(layers, xs):
            return jnp.sum(jnp.sin(nnx.vmap(lambda layer, xs: layer(xs))(layers, xs)))

        return nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))(layers, xs), nnx.state(layers)

    ours = ensemble(lambda cell: pair(cell)[0])
    comparison.assert_same(ours, ensemble(nnx.RNN), tolerance=1e-10)


def test_filters_are_given_the_paths_of_flax():
    """A cell without a head is lifted by itself: filters by path may ask for its own names."""

    class Counting(Elman.cell_class):
        def __init__(self, rngs):
            super().__init__(4, rngs=rngs)
            self.count = nnx.Variable(jnp.int32(0))

        def __call__(self, carry, x):
            self.count[...] += 1
            return super().__call__(carry, x)

    axes = nnx.StateAxes({(lambda path, _: tuple(path) == ("count",)): nnx.Carry, ...: None})
    layer = bptt_jax.nnx.RNN(Counting(nnx.Rngs(0)), state_axes=axes)
    layer(inputs(2, 30, 5))
    assert layer.cell.count[...] == 30
