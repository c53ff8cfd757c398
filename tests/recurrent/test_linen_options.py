"""Every option of `flax.linen.RNN` in ours: results, variables, random bits and gradients are Flax's."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax
from bptt_jax.linen import RNN
from tests.recurrent.test_linen import flax_promotion, in_double, loss_of  # noqa: F401  the fixture is used by its name
from tests.support import comparison

LENGTHS = jnp.array([30, 0, 17])
# Plans, not budgets: of steps as small as these, what does not grow with the length is most of any budget.
PLAN = bptt_jax.plans.parse("5*[6]")
INPUTS = np.random.default_rng(1).normal(size=(3, 30, 5))  # JAX is set to double precision later than this is read


class Cell(nn.RNNCellBase):
    """Statistics of its batches, dropout and a trace of what it does: all that a cell can have beside parameters."""

    features: int = 4
    norm: bool = False
    dropout: bool = False
    own_key: bool = False

    @nn.compact
    def __call__(self, carry, x):
        new = nn.tanh(nn.Dense(self.features, param_dtype=jnp.float64)(x) + carry)
        if self.norm:
            new = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)(new)
        if self.dropout:
            new = nn.Dropout(0.5, deterministic=False)(new)
        if self.own_key:
            new = new + jax.random.normal(self.make_rng("noise"), new.shape)
        self.sow("intermediates", "new", new)
        return new, 2 * new

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], self.features))

    @property
    def num_feature_axes(self):
        return 1


@pytest.mark.one_in(9)
@pytest.mark.parametrize("order", [{}, {"reverse": True}, {"reverse": True, "keep_order": True}], ids=str)
@pytest.mark.parametrize("time_major", [False, True])
def test_lengths_of_sequences(order, time_major):
    inputs = jnp.moveaxis(INPUTS, 1, 0) if time_major else INPUTS
    cell = nn.LSTMCell(4, param_dtype=jnp.float64)
    theirs = nn.RNN(cell, time_major=time_major, **order)
    ours = RNN(cell, time_major=time_major, plan=PLAN, **order)
    variables = in_double(theirs.init(jax.random.key(0), inputs))
    for call in ({"return_carry": True}, {}):
        pair = [loss_of(layer, inputs, seq_lengths=LENGTHS, **call)(variables, inputs) for layer in (ours, theirs)]
        comparison.assert_same(*pair, tolerance=1e-10)


def test_selected_carries_are_never_stacked():
    """The loss is on the carry behind each sequence's last step; Flax keeps all carries for it."""
    layer = RNN(nn.GRUCell(64), return_carry=True, budget="10%")
    inputs, lengths = jax.ShapeDtypeStruct((8, 1000, 64), jnp.float32), jnp.arange(100, 900, 100)
    variables = jax.eval_shape(layer.init, jax.random.key(0), inputs)
    temporaries = [
        jax.jit(jax.grad(lambda v, x, layer=layer: jnp.sum(jnp.sin(layer.apply(v, x, seq_lengths=lengths)[0]))))
        .lower(variables, inputs)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for layer in (layer, nn.RNN(nn.GRUCell(64), return_carry=True))
    ]
    # Beside the budget: the inputs with time in front.
    assert temporaries[0] < 0.15 * temporaries[1] + 8 * 1000 * 64 * 4


@pytest.mark.parametrize(
    "options",
    [
        {"variable_axes": {"params": 0}, "variable_broadcast": False, "split_rngs": {"params": True}},
        {"variable_axes": {"params": 1}, "variable_broadcast": False, "split_rngs": {"params": False}, "reverse": True},
        {"variable_axes": {"batch_stats": 0, "intermediates": 0}},
        {"variable_axes": {flax.core.DenyList("params"): 0}, "reverse": True},
        {"variable_axes": {"batch_stats": 0, "intermediates": flax.typing.Out(1)}},
    ],
    ids=str,
)
def test_collections_of_each_step(options):
    """Also what initialising makes, and in which order."""
    cell = Cell(norm="batch_stats" in str(options) or "Deny" in str(options))
    theirs, ours = nn.RNN(cell, **options), RNN(cell, plan=PLAN, **options)
    expected = theirs.init(jax.random.key(0), INPUTS)
    variables = ours.init(jax.random.key(0), INPUTS)
    comparison.assert_same(in_double(variables), in_double(expected), tolerance=0)
    check_mutable(ours, theirs, in_double(expected), ["batch_stats", "intermediates"])


def check_mutable(ours, theirs, variables, mutable, **call):
    def loss_of(layer):
        def loss(params, inputs):
            y, new = layer.apply({**variables, "params": params}, inputs, mutable=mutable, **call)
            return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(new)), (y, new)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    pair = [loss_of(layer)(variables["params"], INPUTS) for layer in (ours, theirs)]
    assert jax.tree.structure(pair[0]) == jax.tree.structure(pair[1])
    comparison.assert_same(*pair, tolerance=1e-10)


def test_collections_that_steps_hand_on():
    cell = Cell(norm=True)
    options = {"variable_carry": "batch_stats"}
    ours, theirs = RNN(cell, plan=PLAN, **options), nn.RNN(cell, **options)
    # Flax cannot initialise such a layer; ours starts as the cell alone does.
    variables = in_double(ours.init(jax.random.key(0), INPUTS))
    alone = in_double(cell.init(jax.random.key(0), jnp.zeros((3, 4)), INPUTS[:, 0]))
    shared = variables["batch_stats"]["cell"]
    comparison.assert_same(shared, alone["batch_stats"], tolerance=0)
    check_mutable(ours, theirs, variables, ["batch_stats"])
    check_mutable(ours, theirs, variables, ["batch_stats"], reverse=True, seq_lengths=LENGTHS)


def test_a_shared_collection_cannot_be_changed():
    layer = RNN(Cell(norm=True), variable_broadcast=["params", "batch_stats"])
    variables = layer.init(jax.random.key(0), INPUTS)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        layer.apply(variables, INPUTS, mutable=["batch_stats"])
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match="batch_stats"):
        RNN(Cell(norm=True)).init(jax.random.key(0), INPUTS)


@pytest.mark.one_in(11)
@pytest.mark.parametrize("cell", [Cell(dropout=True), Cell(own_key=True), Cell(dropout=True, own_key=True)], ids=str)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_random_bits_are_those_of_flax_in_every_plan(cell, split, reverse):
    options = {"split_rngs": {"params": False, "dropout": split, "noise": split}, "reverse": reverse}
    rngs = {"dropout": jax.random.key(5), "noise": jax.random.key(6)}
    theirs = nn.RNN(cell, **options)
    variables = in_double(theirs.init({"params": jax.random.key(0), **rngs}, INPUTS))
    expected = loss_of(theirs, INPUTS, rngs=rngs)(variables, INPUTS)
    for plan in (None, PLAN, bptt_jax.plans.parse("(2*[2*[6]] + 6)")):
        layer = RNN(cell, plan=plan, **options)
        comparison.assert_same(
            in_double(layer.init({"params": jax.random.key(0), **rngs}, INPUTS)), variables, tolerance=0
        )
        comparison.assert_same(loss_of(layer, INPUTS, rngs=rngs)(variables, INPUTS), expected, tolerance=1e-10)


def test_a_layer_called_twice_draws_anew_as_in_flax():
    def twice(layer_class, **options):
        class Twice(nn.Module):
            @nn.compact
            def __call__(self, x):
                layer = layer_class(Cell(dropout=True), split_rngs={"params": False, "dropout": True}, **options)
                return layer(x) + 2 * layer(x)

        return Twice()

    theirs, ours = twice(nn.RNN), twice(RNN, plan=PLAN)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(5)}
    variables = theirs.init(rngs, INPUTS)
    pair = [model.apply(variables, INPUTS, rngs=rngs) for model in (ours, theirs)]
    comparison.assert_same(*pair, tolerance=1e-6)


def test_without_a_key_the_error_is_flaxs():
    layer = RNN(Cell(dropout=True), split_rngs={"params": False, "dropout": True})
    variables = layer.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, INPUTS)
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "dropout"'):
        layer.apply(variables, INPUTS)


def test_explain_takes_what_the_call_takes():
    layer = RNN(
        Cell(dropout=True, norm=True),
        budget=30_000,
        split_rngs={"params": False, "dropout": True},
        variable_carry="batch_stats",
    )
    rngs = {"dropout": jax.random.key(1)}
    variables = in_double(layer.init({"params": jax.random.key(0), **rngs}, INPUTS))
    reports = [
        bptt_jax.linen.explain(layer, variables, INPUTS, rngs=rngs, mutable=["batch_stats"], **call)
        for call in ({}, {"seq_lengths": LENGTHS, "return_carry": True})
    ]
    assert reports[0].profile.carry_bytes < reports[1].profile.carry_bytes
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "dropout"'):
        bptt_jax.linen.explain(layer, variables, INPUTS, mutable=["batch_stats"])


def test_a_collection_that_steps_hand_on_must_be_there():
    """Made anew in each step it would be lost between them."""
    layer = RNN(Cell(norm=True), variable_carry="batch_stats")
    params = {"params": layer.init(jax.random.key(0), INPUTS)["params"]}
    with pytest.raises(ValueError, match="makes the collection 'batch_stats' in its first step, but variable_carry"):
        layer.apply(params, INPUTS, mutable=["batch_stats"])


class Residual(nn.RNNCellBase):
    inner: nn.Module

    def __call__(self, carry, x):
        carry, y = self.inner(carry, x)
        return carry, y + 1

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return self.inner.initialize_carry(rng, input_shape)

    @property
    def num_feature_axes(self):
        return 1


def test_a_module_of_a_parent_is_refused_not_copied():
    """Weights that are tied would come apart without a word."""

    class Model(nn.Module):
        parent_of_inner: object

        @nn.compact
        def __call__(self, x):
            own = {"parent": None} if self.parent_of_inner is None else {}
            return RNN(Residual(nn.GRUCell(4, param_dtype=jnp.float64, **own)))(x)

    with pytest.raises(
        NotImplementedError, match="the cell Residual has the module GRUCell_0, which belongs to a parent"
    ):
        Model("model").init(jax.random.key(0), INPUTS)
    assert list(Model(None).init(jax.random.key(0), INPUTS)["params"]["Residual_0"]) == ["inner"]
