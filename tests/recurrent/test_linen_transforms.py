"""Linen layers inside other modules and under Flax's transformations; resets, stacks, shared budgets."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax
from bptt_jax.linen import RNN, Stack, share_budget
from tests.recurrent.test_linen import flax_promotion, in_double, loss_of  # noqa: F401  the fixture is used by its name
from tests.support import comparison

INPUTS = np.random.default_rng(1).normal(size=(3, 40, 5))  # JAX is set to double precision later than this is read
# A plan, not a budget: of steps as small as these, what does not grow with the length is most of any budget.
PLAN = bptt_jax.plans.parse("(4*[9] + 4)")
double = functools.partial(nn.GRUCell, param_dtype=jnp.float64)


def bidirectional(rnn):
    return nn.Bidirectional(rnn(double(4)), rnn(double(3)), return_carry=True)


def sequential(rnn):
    return nn.Sequential([rnn(double(4)), nn.relu, rnn(double(3))])


def over_a_batch_of_weights(rnn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            several = nn.vmap(
                lambda module, x: rnn(double(4), parent=module)(x),
                in_axes=None,
                axis_size=2,
                variable_axes={"params": 0},
                split_rngs={"params": True},
            )
            return several(self, x)

    return Model()


def jitted(rnn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(lambda module, x: rnn(double(4), parent=module)(x))(self, x)

    return Model()


def rematerialised(rnn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(lambda module, x: rnn(double(4), parent=module)(x))(self, x)

    return Model()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("model", [bidirectional, sequential, over_a_batch_of_weights, jitted, rematerialised])
def test_inside_flax(model):
    theirs, ours = model(nn.RNN), model(functools.partial(RNN, plan=PLAN))
    variables = in_double(theirs.init(jax.random.key(0), INPUTS))
    comparison.assert_same(in_double(ours.init(jax.random.key(0), INPUTS)), variables, tolerance=0)
    pair = [loss_of(layer, INPUTS)(variables, INPUTS) for layer in (ours, theirs)]
    comparison.assert_same(*pair, tolerance=1e-10)


def test_bidirectional_with_lengths():
    theirs, ours = bidirectional(nn.RNN), bidirectional(functools.partial(RNN, plan=PLAN))
    variables = in_double(theirs.init(jax.random.key(0), INPUTS))
    lengths = jnp.array([40, 3, 17])
    pair = [loss_of(layer, INPUTS, seq_lengths=lengths)(variables, INPUTS) for layer in (ours, theirs)]
    comparison.assert_same(*pair, tolerance=1e-10)


@pytest.mark.parametrize("call", [{}, {"reverse": True, "keep_order": True}, {"time_major": True}], ids=str)
def test_resets_begin_a_sequence_anew(call):
    """Against a loop over steps."""
    steps_in_all = 12
    inputs = INPUTS[:, :steps_in_all]
    cell = nn.LSTMCell(4, param_dtype=jnp.float64)
    layer = RNN(cell, plan=bptt_jax.plans.parse("3*[4]"), return_carry=True)
    variables = in_double(layer.init(jax.random.key(0), inputs))
    resets = jax.random.bernoulli(jax.random.key(2), 0.2, inputs.shape[:2])
    fresh = in_double(cell.initialize_carry(jax.random.key(0), (3, 5)))
    first = jax.tree.map(lambda leaf: leaf + 0.5, fresh)  # of an episode that goes on from an earlier rollout
    steps = range(steps_in_all)[:: -1 if call.get("reverse") else 1]

    def loop(variables, inputs, first):
        carry, ys = first, {}
        for t in steps:
            where = resets[:, t, None]
            carry = jax.tree.map(lambda a, b, where=where: jnp.where(where, a, b), fresh, carry)
            carry, ys[t] = cell.apply({"params": variables["params"]["cell"]}, carry, inputs[:, t])
        return carry, jnp.stack([ys[t] for t in sorted(ys)], 1)

    def ours(variables, inputs, first):
        major = call.get("time_major", False)
        given = (jnp.moveaxis(inputs, 1, 0), resets.T) if major else (inputs, resets)
        carry, ys = layer.apply(variables, given[0], resets=given[1], initial_carry=first, **call)
        return carry, jnp.moveaxis(ys, 0, 1) if major else ys

    def loss_of(run):
        def loss(*args):
            results = run(*args)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(results)), results

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    pair = [loss_of(run)(variables, inputs, first) for run in (ours, loop)]
    comparison.assert_same(*pair, tolerance=1e-10)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({"seq_lengths": jnp.array([3, 4])}, ValueError, r"the shape of the batch, \(3,\), got \(2,\)"),
        ({"seq_lengths": jnp.array([3.0, 4.0, 5.0])}, TypeError, "must be integers, got float"),
        ({"resets": jnp.zeros((3, 40))}, TypeError, "resets must be booleans, got float"),
        ({"resets": jnp.zeros((40, 3), bool)}, ValueError, r"\(\*batch, time\), \(3, 40\), got \(40, 3\)"),
    ],
)
def test_malformed_lengths_and_resets(call, error, match):
    layer = RNN(double(4))
    variables = layer.init(jax.random.key(0), INPUTS)
    with pytest.raises(error, match=match):
        layer.apply(variables, INPUTS, **call)


def test_a_stack_equals_layers_one_after_another():
    cells = [double(4), nn.OptimizedLSTMCell(6, param_dtype=jnp.float64), double(3)]
    ours = RNN(Stack(cells), plan=PLAN, return_carry=True)
    theirs = [nn.RNN(cell, return_carry=True) for cell in cells]
    variables = in_double(ours.init(jax.random.key(0), INPUTS))

    def layers(variables, inputs):
        carries = []
        for i, layer in enumerate(theirs):
            params = {"cell": variables["params"]["cell"][f"cells_{i}"]}
            carry, inputs = layer.apply({"params": params}, inputs)
            carries.append(carry)
        return tuple(carries), inputs

    def loss_of(run):
        def loss(*args):
            results = run(*args)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(results)), results

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    pair = [loss_of(run)(variables, INPUTS) for run in (ours.apply, layers)]
    comparison.assert_same(*pair, tolerance=1e-10)


WIDTH, STEPS, BATCH = 256, 1000, 16


def temporaries(layers):
    """Of the gradient for the weights; the loss is on the last carry."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers(x)

    model, inputs = Model(), jax.ShapeDtypeStruct((STEPS, BATCH, WIDTH), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)

    def loss(variables, inputs):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(model.apply(variables, inputs)))

    compiled = jax.jit(jax.grad(loss)).lower(variables, inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def in_a_row(make, x):
    for _ in range(4):
        carry, x = make(x)
    return carry


@pytest.mark.slow
def test_four_layers_in_five_per_cent_of_flax():
    def flax_layer(x):
        return nn.RNN(nn.LSTMCell(WIDTH), time_major=True, return_carry=True)(x)

    def ours(x):
        stack = Stack([nn.LSTMCell(WIDTH) for _ in range(4)])
        return RNN(stack, time_major=True, return_carry=True, budget="5%")(x)[0][-1]

    theirs, found = temporaries(functools.partial(in_a_row, flax_layer)), temporaries(ours)
    print(f"flax {theirs / 2**20:.1f} MiB, ours {found / 2**20:.1f} MiB, {found / theirs:.3f}")
    assert found <= 0.05 * theirs


@pytest.mark.slow
def test_four_bidirectional_layers_in_the_sequences_between_them_and_five_per_cent_of_flax():
    def layer(rnn, x):
        return nn.Bidirectional(rnn(nn.LSTMCell(WIDTH)), rnn(nn.LSTMCell(WIDTH)), time_major=True, return_carry=True)(x)

    ours = functools.partial(RNN, budget=share_budget("0.8%", 8))
    found, theirs = (temporaries(functools.partial(in_a_row, functools.partial(layer, rnn))) for rnn in (ours, nn.RNN))
    between = 3 * STEPS * BATCH * 2 * WIDTH * 4
    print(f"flax {theirs / 2**20:.1f} MiB, ours {found / 2**20:.1f} MiB, sequences {between / 2**20:.1f} MiB")
    assert found <= between + 0.05 * theirs


def test_a_shared_budget():
    assert share_budget("64MiB", 4) == 16 << 20
    assert share_budget(100, 3) == 33
    assert share_budget("5%", 3) == "5%"
    assert share_budget(None, 3) is None
    assert bptt_jax.scan(lambda c, x: (c, x), 0.0, jnp.ones(3), budget=share_budget("auto", 2))[0] == 0.0
    with pytest.raises(ValueError, match="budget=3 is 3 bytes, too little for 4 layers"):
        share_budget(3, 4)
    with pytest.raises(ValueError, match="layers must be"):
        share_budget("1MiB", 0)


def test_a_budget_is_shared_by_its_form_not_its_size():
    assert share_budget("0.00001%", 2) == "0.00001%"
    assert share_budget("10B", 2) == 5
    with pytest.raises(ValueError, match="is 1 bytes, too little for 2 layers"):
        share_budget("1B", 2)
