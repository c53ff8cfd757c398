"""A head in the scan of an NNX layer: values, gradients and state of the same head behind the layer."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.nnx.nn.recurrent import flip_sequences

import bptt_jax
from bptt_jax.nnx import RNN
from tests.recurrent.test_head import GIVEN, INPUTS, LABELS, LENGTHS, PLAN, STEPS, major
from tests.support import comparison
from tests.support.nnx_cells import DOUBLE, Counter


@pytest.fixture(autouse=True)
def flax_promotion():
    """Flax's initialisers mix dtypes under x64."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")


class Head(nnx.Module):
    """Several outputs of several shapes, made of y and of floats and integers."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 6, rngs=rngs, **DOUBLE)

    def __call__(self, y, given):
        floats, label = given
        logits = self.dense(y)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], -1)[..., 0]
        return {"error": (logits - floats["target"]) ** 2, "loss": (floats["weight"] * chosen, y[..., 0])}


class Behind(nnx.Module):
    """The layer of Flax, and the head behind it."""

    def __init__(self, cell, head, layer_class=nnx.RNN):
        self.cell, self.head, self.layer_class = cell, head, layer_class

    def __call__(self, inputs, head_inputs, **call):
        carry, ys = self.layer_class(self.cell)(inputs, **call | {"keep_order": True, "return_carry": True})
        outputs = self.head(ys, head_inputs)
        if call.get("reverse") and not call.get("keep_order"):
            lengths, is_major = call.get("seq_lengths"), call.get("time_major", False)
            outputs = jax.tree.map(lambda leaf: flip_sequences(leaf, lengths, 1, is_major), outputs)
        return (carry, outputs) if call.get("return_carry") else outputs


def cell():
    return nnx.GRUCell(5, 4, rngs=nnx.Rngs(0), dtype=jnp.float64, **DOUBLE)


def outcome(layer, inputs, floats, labels, **call):
    """Results, gradients of the state and of all inputs, and the state of cell and head behind the call."""

    @nnx.jit
    def run(layer, inputs, floats):
        def loss(layer, inputs, floats):
            given = (floats, labels) if labels is not None else floats
            result = layer(inputs, head_inputs=given, **call)
            leaves = jax.tree.leaves(result)
            return sum(jnp.sum(jnp.sin(leaf) * comparison.distinct_weights(leaf)) for leaf in leaves), result

        (value, result), gradients = nnx.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(layer, inputs, floats)
        return value, result, {name: gradients[0][name] for name in ("cell", "head")}, gradients[1:]

    return run(layer, inputs, floats), [nnx.state(part) for part in (layer.cell, layer.head)]


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "call",
    [
        {"return_carry": True},
        {"reverse": True, "seq_lengths": LENGTHS, "return_carry": True},
        {"time_major": True, "reverse": True, "keep_order": True},
        {"reverse": True, "keep_order": True, "seq_lengths": LENGTHS, "time_major": True},
        {"reverse": True},
        {"resets": jnp.arange(3 * STEPS).reshape(3, STEPS) % 7 == 0, "return_carry": True},
    ],
    ids=str,
)
def test_equals_the_head_behind_the_layer(call):
    sequences = INPUTS, GIVEN, LABELS
    sequences = major(sequences) if call.get("time_major") else sequences
    layer_class = RNN if "resets" in call else nnx.RNN  # Flax has none
    ours, theirs = (
        outcome(layer, *sequences, **call)
        for layer in (
            RNN(cell(), head=Head(nnx.Rngs(1)), plan=PLAN),
            Behind(cell(), Head(nnx.Rngs(1)), layer_class),
        )
    )
    comparison.assert_same(ours, theirs, tolerance=1e-12)


class Busy(nnx.Module):
    """A head with every kind of state: keys, statistics, a counter, and what it sows for each step."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 6, rngs=rngs, **DOUBLE)
        self.dropout = nnx.Dropout(0.4, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs, **DOUBLE)
        for statistics in (self.norm.mean, self.norm.var):
            statistics.set_value(statistics[...].astype(jnp.float64))
        self.steps = Counter(jnp.int32(0))

    def __call__(self, y, target):
        self.steps[...] += 1
        return (self.norm(self.dropout(self.dense(y))) - target) ** 2


class Together(nnx.RNNCellBase):
    """Cell and head as one cell, for Flax's layer; its x is that of the cell beside the target of the head."""

    def __init__(self, cell, head):
        self.cell, self.head = cell, head

    def __call__(self, carry, x):
        carry, y = self.cell(carry, x[..., :5])
        return carry, self.head(y, x[..., 5:])

    def initialize_carry(self, input_shape, rngs=None):
        return self.cell.initialize_carry((*input_shape[:-1], 5), rngs)

    num_feature_axes = 1


def test_state_and_keys_of_a_head_are_lifted_as_those_of_the_cell():
    target = GIVEN["target"]
    layer = RNN(cell(), head=Busy(nnx.Rngs(1, dropout=3)), plan=PLAN, reverse=True)

    class Flax(nnx.Module):
        def __init__(self, cell, head):
            self.layer = nnx.RNN(Together(cell, head), reverse=True)
            self.cell, self.head = cell, head

        def __call__(self, inputs, head_inputs):
            return self.layer(jnp.concatenate([inputs, head_inputs], -1))

    theirs = outcome(Flax(cell(), Busy(nnx.Rngs(1, dropout=3))), INPUTS, target, None)
    # Flax's model has each module under two names, so its gradients are at the first.
    gradients = theirs[0][2]
    ours = outcome(layer, INPUTS, target, None)
    assert int(ours[1][1]["steps"][...]) == STEPS
    comparison.assert_same((ours[0][:2], ours[0][3:], ours[1]), (theirs[0][:2], theirs[0][3:], theirs[1]), 1e-12)
    comparison.assert_same(ours[0][2], gradients, tolerance=1e-12)


def test_a_weight_shared_by_cell_and_head_has_one_gradient():
    class Embedded(nnx.RNNCellBase):
        def __init__(self, embed, inner):
            self.embed, self.inner = embed, inner

        def __call__(self, carry, x):
            return self.inner(carry, self.embed(x))

        def initialize_carry(self, input_shape, rngs=None):
            return self.inner.initialize_carry((*input_shape, 5), rngs)

        num_feature_axes = 0

    class Tied(nnx.Module):
        def __init__(self, embed):
            self.embed = embed

        def __call__(self, y, label):
            return jnp.take_along_axis(jax.nn.log_softmax(self.embed.attend(y)), label[..., None], -1)[..., 0]

    def gradient_of(make, labels):
        embed = nnx.Embed(6, 5, rngs=nnx.Rngs(0), dtype=jnp.float64, **DOUBLE)
        inner = nnx.SimpleCell(5, 5, rngs=nnx.Rngs(1), dtype=jnp.float64, **DOUBLE)
        model = make(Embedded(embed, inner), Tied(embed))
        state = nnx.grad(lambda model: model(labels, head_inputs=labels).sum())(model)
        return state["cell"]["embed"]["embedding"][...]

    ours, theirs = (
        gradient_of(make, jnp.asarray(LABELS)) for make in (lambda cell, head: RNN(cell, head=head, plan=PLAN), Behind)
    )
    comparison.assert_same(ours, theirs, tolerance=1e-12)


def test_explain_takes_head_inputs():
    layer = RNN(cell(), head=Head(nnx.Rngs(1)), budget="90%")
    report = bptt_jax.nnx.explain(layer, jnp.asarray(INPUTS), head_inputs=(GIVEN, LABELS))
    assert report.profile.y_bytes == 8 * 3 * (6 + 1 + 1)


def test_vmap_over_examples():
    def result_of(layer, **call):
        def loss(layer, inputs):
            first = {"initial_carry": jnp.zeros(4)}  # because keys for it could not be drawn under `jax.vmap`
            graphdef, state = nnx.split(layer)

            def run(state, inputs, given):  # on a layer of its own, because a call writes the state
                return nnx.merge(graphdef, state)(inputs, head_inputs=given, **first)

            outputs = jax.vmap(run, in_axes=(None, 0, 0))(state, inputs, (GIVEN, LABELS))
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs))

        value, (of_layer, of_inputs) = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))(layer, jnp.asarray(INPUTS))
        return value, [of_layer[name] for name in ("cell", "head")], of_inputs

    ours, theirs = (
        result_of(layer)
        for layer in (
            RNN(cell(), head=Head(nnx.Rngs(1)), plan=PLAN, rngs=False),
            Behind(cell(), Head(nnx.Rngs(1))),
        )
    )
    comparison.assert_same(ours, theirs, tolerance=1e-12)
