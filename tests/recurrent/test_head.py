"""A head in the scan: values, gradients, variables and random bits of the same head behind the layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen.recurrent import flip_sequences

import bptt_jax
from bptt_jax.linen import RNN
from tests.recurrent.test_linen import flax_promotion, in_double  # noqa: F401  the fixture is used by its name
from tests.support import comparison

STEPS, BATCH = 24, (3,)
LENGTHS = jnp.array([24, 0, 13])
# Plans, not budgets: of steps as small as these, what does not grow with the length is most of any budget.
PLAN = bptt_jax.plans.parse("4*[6]")
_random = np.random.default_rng(1)  # JAX is set to double precision later than this is read
INPUTS = _random.normal(size=(*BATCH, STEPS, 5))
GIVEN = {"target": _random.normal(size=(*BATCH, STEPS, 6)), "weight": _random.normal(size=(*BATCH, STEPS))}
LABELS = _random.integers(0, 6, (*BATCH, STEPS))
CELL = nn.GRUCell(4, param_dtype=jnp.float64)


class Head(nn.Module):
    """Several outputs of several shapes, made of y and of floats and integers."""

    @nn.compact
    def __call__(self, y, given):
        floats, label = given
        logits = nn.Dense(6, param_dtype=jnp.float64)(y)
        chosen = jnp.take_along_axis(nn.log_softmax(logits), label[..., None], -1)[..., 0]
        return {"error": (logits - floats["target"]) ** 2, "loss": (floats["weight"] * chosen, y[..., 0])}


def variables_of(layer=None, given=(GIVEN, LABELS)):
    layer = layer or RNN(CELL, head=Head())
    return in_double(layer.init(jax.random.key(0), INPUTS, head_inputs=given))


def major(tree):
    """Sequences with time first."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tree)


def outside(variables, inputs, given, head=None, **call):
    """The layer of Flax, and the head behind it."""
    params = variables["params"]
    flags = {"keep_order": True, "return_carry": True}
    if "resets" in call:  # Flax has none
        result = RNN(CELL, plan=PLAN).apply({"params": {"cell": params["cell"]}}, inputs, **call | flags)
    else:
        result = nn.RNN(CELL).apply({"params": {"cell": params["cell"]}}, inputs, **call | flags)
    carry, ys = result
    outputs = (head or Head()).apply({"params": params["head"]}, ys, given)
    if call.get("reverse") and not call.get("keep_order"):
        lengths, is_major = call.get("seq_lengths"), call.get("time_major", False)
        outputs = jax.tree.map(lambda leaf: flip_sequences(leaf, lengths, 1, is_major), outputs)
    return (carry, outputs) if call.get("return_carry") else outputs


def inside(variables, inputs, given, layer=None, **call):
    return (layer or RNN(CELL, head=Head(), plan=PLAN)).apply(variables, inputs, head_inputs=given, **call)


def loss_of(run, labels=LABELS, **call):
    """A loss of a list: variables, inputs, and the floats of the head's inputs."""

    def loss(floats):
        variables, inputs, given = floats
        result = run(variables, inputs, (given, labels), **call)
        leaves = jax.tree.leaves(result)
        return sum(jnp.sum(jnp.sin(leaf) * comparison.distinct_weights(leaf)) for leaf in leaves), result

    return loss


def assert_equal(floats, labels=LABELS, derivative=comparison.value_and_grad, layer=None, **call):
    ours = derivative(loss_of(lambda *args, **call: inside(*args, layer, **call), labels, **call), floats)
    theirs = derivative(loss_of(outside, labels, **call), floats)
    comparison.assert_same(ours, theirs, tolerance=1e-12)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("order", [{}, {"reverse": True}, {"reverse": True, "keep_order": True}], ids=str)
def test_equals_the_head_behind_the_layer(order, lengths, time_major):
    call = {**order, "time_major": time_major, "return_carry": True}
    if lengths is not None:
        call["seq_lengths"] = lengths
    sequences = INPUTS, GIVEN, LABELS
    inputs, given, labels = major(sequences) if time_major else sequences
    assert_equal([variables_of(), inputs, given], labels, **call)


def test_resets_and_a_first_carry():
    resets = jax.random.bernoulli(jax.random.key(2), 0.2, (*BATCH, STEPS))
    call = {"resets": resets, "initial_carry": jnp.full((*BATCH, 4), 0.5), "return_carry": True}
    assert_equal([variables_of(), INPUTS, GIVEN], **call)


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    "options",
    [
        {"budget": "90%", "verify": False},
        {"plan": "4*[6]", "lowering": "nested"},
        {"plan": "(2*[2*[5]] + 4)", "unroll": 2},
        {"plan": "24"},
        {},
    ],
    ids=str,
)
def test_every_plan(options):
    if "plan" in options:
        options = {**options, "plan": bptt_jax.plans.parse(options["plan"])}
    assert_equal([variables_of(), INPUTS, GIVEN], layer=RNN(CELL, head=Head(), **options), reverse=True)


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "derivative",
    [
        comparison.jvp,
        comparison.vmapped_grad,
        comparison.forward_over_reverse,
        comparison.reverse_over_reverse,
    ],
)
def test_transformations(derivative):
    leaves, tree = jax.tree.flatten([variables_of(), INPUTS, GIVEN])
    floats = [jnp.asarray(leaf) for leaf in leaves]
    runs = [loss_of(run, seq_lengths=LENGTHS) for run in (inside, outside)]
    pair = [derivative(lambda floats, run=run: run(jax.tree.unflatten(tree, floats)), floats) for run in runs]
    comparison.assert_same(*pair, tolerance=1e-12)


def test_a_function_is_a_head_without_variables():
    layer = RNN(CELL, head=lambda y: (y**2, y.sum()), time_major=True, plan=PLAN)
    variables = in_double(layer.init(jax.random.key(0), major(INPUTS)))
    assert list(variables["params"]) == ["cell"]
    squares, sums = layer.apply(variables, major(INPUTS))
    ys = nn.RNN(CELL, time_major=True).apply(variables, major(INPUTS))
    comparison.assert_same((squares, sums), (ys**2, ys.sum((1, 2))), tolerance=1e-12)
    short = RNN(CELL, head=layer.head, time_major=True).apply(variables, jnp.zeros((0, 3, 5)))
    assert [leaf.shape for leaf in short] == [(0, 3, 4), (0,)]


def test_keys_are_inputs_of_a_head_too():
    keys = jax.random.split(jax.random.key(3), (*BATCH, STEPS))

    def noisy(y, key):
        return y + jax.vmap(lambda key: jax.random.normal(key, (4,)))(key)

    variables = in_double(RNN(CELL, head=noisy).init(jax.random.key(0), INPUTS, head_inputs=keys))
    ours = RNN(CELL, head=noisy, plan=PLAN).apply(variables, INPUTS, head_inputs=keys)
    theirs = jax.vmap(noisy, 1, 1)(nn.RNN(CELL).apply(variables, INPUTS), keys)
    comparison.assert_same(ours, theirs, tolerance=1e-12)


class Busy(nn.Module):
    """A head with statistics of its batches, dropout, and a trace of its work."""

    norm: bool = False

    @nn.compact
    def __call__(self, y, target):
        y = nn.Dropout(0.5, deterministic=False)(nn.Dense(6, param_dtype=jnp.float64)(y))
        if self.norm:
            y = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)(y)
        self.sow("intermediates", "y", y)
        return (y - target) ** 2


class Behind(nn.Module):
    """The layer of Flax, and the head in a loop of its own behind it."""

    cell: nn.Module
    head: nn.Module
    options: dict

    @nn.compact
    def __call__(self, inputs, head_inputs):
        ys = nn.RNN(self.cell, **self.options)(inputs)
        options = {"variable_broadcast": "params", **self.options}
        scan = nn.scan(lambda head, _, at: (_, head(*at)), in_axes=1, out_axes=1, **options)
        return scan(self.head, (), (ys, head_inputs))[1]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("norm", "options"),
    [
        (False, {"split_rngs": {"params": False, "dropout": True}}),
        (False, {"split_rngs": {"params": False, "dropout": False}, "variable_axes": {"intermediates": 0}}),
        (True, {"split_rngs": {"params": False, "dropout": True}, "variable_carry": "batch_stats"}),
        (
            True,
            {"split_rngs": {"params": False, "dropout": True}, "variable_axes": {"batch_stats": 1, "intermediates": 0}},
        ),
    ],
    ids=str,
)
def test_collections_and_random_bits_are_those_of_a_scanned_head(norm, options):
    head, target = Busy(norm), GIVEN["target"]
    ours, theirs = RNN(CELL, head=head, plan=PLAN, **options), Behind(CELL, head, options)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(5)}
    variables = in_double(ours.init(rngs, INPUTS, head_inputs=target))
    if "variable_carry" not in options:  # Flax cannot initialise such a loop
        comparison.assert_same(variables, in_double(theirs.init(rngs, INPUTS, target)), tolerance=0)
    mutable = ["batch_stats", "intermediates"]

    def result_of(layer):
        def loss(params, *args):
            given = {"head_inputs": args[1]} if layer is ours else {"target": args[1]}
            args = args[:1] if layer is ours else args
            call = given if layer is ours else {}
            now = {**variables, "params": params}
            outputs, new = layer.apply(now, *args, rngs={"dropout": rngs["dropout"]}, mutable=mutable, **call)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((outputs, new))), (outputs, new)

        derivative = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(derivative)(variables["params"], INPUTS, target)

    comparison.assert_same(result_of(ours), result_of(theirs), tolerance=1e-12)


def test_variables_belong_to_whoever_makes_the_head():
    class Model(nn.Module):
        layer: type

        @nn.compact
        def __call__(self, x):
            cell, head = CELL.copy(name="gru"), nn.Dense(6, name="logits")
            return RNN(cell, head=head)(x) if self.layer is RNN else head(nn.RNN(cell)(x))

    ours, theirs = (Model(layer).init(jax.random.key(0), INPUTS) for layer in (RNN, nn.RNN))
    comparison.assert_same(ours, theirs, tolerance=0)
    assert sorted(ours["params"]) == ["gru", "logits"]
    assert sorted(variables_of()["params"]) == ["cell", "head"]


def test_logits_of_a_whole_sequence_are_never_made():
    inputs, labels = jax.ShapeDtypeStruct((4, 600, 16), jnp.float32), jax.ShapeDtypeStruct((4, 600), jnp.int32)

    class Loss(nn.Module):
        @nn.compact
        def __call__(self, y, label):
            logits = nn.Dense(512)(y)
            return nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, label[..., None], -1)[..., 0]

    layer = RNN(nn.GRUCell(16), head=Loss(), budget="5%")
    variables = jax.eval_shape(lambda x, label: layer.init(jax.random.key(0), x, head_inputs=label), inputs, labels)
    report = bptt_jax.linen.explain(layer, variables, inputs, head_inputs=labels)
    gradient = jax.grad(lambda v, x, label: layer.apply(v, x, head_inputs=label).sum())
    program = jax.jit(gradient).lower(variables, inputs, labels).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 600 * 512 * 4 / 5
    assert report.measured_bytes <= report.budget_bytes
    assert report.store_all_bytes > 4 * 600 * 512 * 4  # the percentage is of a scan that holds them
