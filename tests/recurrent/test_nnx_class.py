"""The Flax NNX layers: what they cost, the classes that `rnn` makes, and errors."""

import pickle

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import bptt_jax
import bptt_jax.linen
import bptt_jax.nnx
from tests.support import comparison
from tests.support.nnx_cells import DOUBLE, Busy, Elman, inputs


@pytest.fixture(autouse=True)
def flax_promotion():
    """Flax's initialisers mix dtypes under x64."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")


def test_state_that_steps_only_read_costs_no_checkpoint():
    cell = Busy(32, rngs=nnx.Rngs(0))
    report = bptt_jax.nnx.explain(bptt_jax.nnx.RNN(cell, budget="50%"), inputs(4, 300, 5))
    # The carry, the statistics of the normalisation, the counter of steps, and that of the drawn keys.
    assert report.profile.carry_bytes == 8 * (4 * 32 + 32 + 32) + 4 + 4
    assert report.measured_bytes <= report.budget_bytes
    assert int(cell.steps[...]) == 0


def test_explain_of_shapes_alone():
    layer = nnx.eval_shape(lambda: Elman(32, rngs=nnx.Rngs(0)))
    report = bptt_jax.nnx.explain(layer, jax.ShapeDtypeStruct((4, 300, 5), jnp.float64))
    assert report.measured_bytes <= report.budget_bytes
    assert report.forward_steps <= 600
    with pytest.raises(TypeError, match=r"explain needs a layer of bptt_jax\.nnx .*, got flax's LSTMCell"):
        bptt_jax.nnx.explain(nnx.LSTMCell(5, 4, rngs=nnx.Rngs(0)), inputs())


def test_decorated_class_keeps_the_cells_identity():
    assert Elman.__name__ == Elman.__qualname__ == "Elman"
    assert Elman.__doc__ == "A cell of the user's own."
    assert Elman.__init__.__annotations__ == Elman.cell_class.__init__.__annotations__
    assert issubclass(Elman, nnx.RNN)
    assert issubclass(Elman.cell_class, nnx.RNNCellBase)
    layer, xs = Elman(3, gain=0.25, rngs=nnx.Rngs(0)), inputs()
    assert layer.cell.gain == 0.25
    assert list(nnx.state(layer)) == list(nnx.state(nnx.RNN(layer.cell))) == ["cell", "rngs"]
    with pytest.raises(TypeError, match="features"):
        Elman(rngs=nnx.Rngs(0))
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is Elman
    comparison.assert_same(again(xs), layer(xs), tolerance=0)
    assert type(pickle.loads(pickle.dumps(layer.cell))) is Elman.cell_class


def test_class_that_no_name_leads_to_is_pickled():
    other = bptt_jax.nnx.rnn(plan=bptt_jax.Steps(30), rngs=False, state_axes={...: nnx.Carry})(Elman.cell_class)
    assert other is not Elman
    assert Elman.cell_class.__qualname__ == "Elman.cell_class"
    assert nnx.LSTMCell.__qualname__ == bptt_jax.nnx.rnn()(nnx.LSTMCell).__qualname__ == "LSTMCell"
    layer = other(3, rngs=nnx.Rngs(0))
    assert type(pickle.loads(pickle.dumps(layer))) is other
    assert layer.plan == bptt_jax.Steps(30)
    assert layer.rngs is None


def test_a_decorator_without_options():
    assert bptt_jax.nnx.rnn(nnx.GRUCell) is bptt_jax.nnx.rnn()(nnx.GRUCell)


def test_errors_say_what_would_work():
    cell, xs = nnx.GRUCell(5, 4, rngs=nnx.Rngs(0), **DOUBLE), inputs()
    make = bptt_jax.nnx.RNN
    with pytest.raises(TypeError, match=r"got the class GRUCell; give an instance of it, or use rnn\(\.\.\.\)"):
        make(nnx.GRUCell)
    with pytest.raises(
        TypeError, match=r"such as flax\.nnx\.LSTMCell .*, got an instance of Linear, which has no initial"
    ):
        make(nnx.Linear(5, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"got an instance of GRUCell; for a cell there is RNN\(cell, \.\.\.\)"):
        bptt_jax.nnx.rnn(cell)
    with pytest.raises(TypeError, match=r"got the class dict, which is no flax\.nnx module"):
        bptt_jax.nnx.rnn()(dict)
    with pytest.raises(TypeError, match="rngs can be True or False, got Rngs"):
        bptt_jax.nnx.rnn(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"maps Ellipsis to 'carry'; an axis is nnx\.Carry"):
        make(cell, state_axes={...: "carry"})
    with pytest.raises(TypeError, match="state_axes must map filters to axes, got 3"):
        make(cell, state_axes=3)
    with pytest.raises(ValueError, match="budget"):
        make(cell, budget="much")
    with pytest.raises(TypeError, match="seq_lengths must be integers"):
        make(cell)(xs, seq_lengths=jnp.ones(2))
    with pytest.raises(ValueError, match=r"resets must have the shape \(\*batch, time\), \(2, 30\), got \(30, 2\)"):
        make(cell)(xs, resets=jnp.ones((30, 2), bool))
    with pytest.raises(bptt_jax.errors.BudgetError, match="smallest"):
        nnx.grad(lambda layer: layer(xs).sum())(make(cell, budget=1))


def test_explain_takes_what_the_call_takes():
    layer, xs = Elman(32, rngs=nnx.Rngs(0)), inputs(4, 300, 5)
    plain = bptt_jax.nnx.explain(layer, xs)
    shapes = {"seq_lengths": jax.ShapeDtypeStruct((4,), jnp.int32), "resets": jax.ShapeDtypeStruct((4, 300), bool)}
    keys = nnx.Rngs(7)
    report = bptt_jax.nnx.explain(layer, xs, rngs=keys, return_carry=True, **shapes)
    assert report.profile.carry_bytes > plain.profile.carry_bytes  # one more is selected
    assert int(keys.carry.count[...]) == 0
    with pytest.raises(TypeError, match="explain got 'lengths', which calling a layer does not take; it takes initial"):
        bptt_jax.nnx.explain(layer, xs, lengths=shapes["seq_lengths"])


def test_a_stack_equals_layers_one_after_another():
    rngs = nnx.Rngs(0)
    cells = [nnx.LSTMCell(5, 4, rngs=rngs, **DOUBLE), nnx.GRUCell(4, 6, rngs=rngs, **DOUBLE)]
    ours = bptt_jax.nnx.RNN(bptt_jax.nnx.Stack(cell for cell in cells), plan=bptt_jax.plans.parse("3*[10]"))
    xs = inputs(2, 30, 5)

    def loss_of_stack(layer, xs):
        return jnp.sum(jnp.sin(layer(xs)))

    def loss_of_layers(first, second, xs):
        return jnp.sum(jnp.sin(second(first(xs))))

    found = nnx.grad(loss_of_stack, argnums=(0, 1))(ours, xs)
    wanted = nnx.grad(loss_of_layers, argnums=(0, 1, 2))(*(nnx.RNN(cell) for cell in cells), xs)
    comparison.assert_same(found[1], wanted[2], tolerance=1e-12)
    for i in range(2):
        stacked, alone = (nnx.to_pure_dict(state) for state in (found[0]["cell"]["cells"][i], wanted[i]["cell"]))
        comparison.assert_same(stacked, alone, tolerance=1e-12)


def other_cell(flax):
    return nnx.GRUCell(4, 4, rngs=nnx.Rngs(0)) if flax is linen else linen.GRUCell(4)


@pytest.mark.parametrize("package", [bptt_jax.linen, bptt_jax.nnx])
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda flax, cell: [], ValueError, "a Stack needs at least one cell, got none"),
        (lambda flax, cell: [flax.LSTMCell], TypeError, "cell 0 of a Stack is the class LSTMCell; give an instance"),
        (lambda flax, cell: [cell, 3], TypeError, "cell 1 of a Stack must be a recurrent cell .* an instance of int"),
        (
            lambda flax, cell: [other_cell(flax)],
            TypeError,
            r"no flax\.\w+ module. It is of flax\.(\w+), for which .*_jax\.\1",
        ),
        (lambda flax, cell: cell, TypeError, "a Stack takes a sequence of cells, got one LSTMCell; put it into a list"),
    ],
)
def test_stacks_of_what_is_no_cell(package, make, error, match):
    flax = linen if package is bptt_jax.linen else nnx
    cell = linen.LSTMCell(4) if flax is linen else nnx.LSTMCell(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(error, match=match):
        package.Stack(make(flax, cell))


def test_the_lowest_cell_of_a_stack_may_take_integers():
    """For example, one that embeds the symbol of its step."""

    class Embedded(linen.RNNCellBase):
        @linen.compact
        def __call__(self, carry, symbol):
            return linen.GRUCell(4, param_dtype=jnp.float64)(carry, linen.Embed(5, 3, param_dtype=jnp.float64)(symbol))

        @linen.nowrap
        def initialize_carry(self, rng, batch):
            return jnp.zeros((*batch, 4))

        num_feature_axes = 0

    stack = bptt_jax.linen.Stack([Embedded(), linen.GRUCell(6, param_dtype=jnp.float64)])
    layer, symbols = bptt_jax.linen.RNN(stack, budget="90%"), jnp.zeros((2, 30), jnp.int32)
    variables = layer.init(jax.random.key(0), symbols)
    assert layer.apply(variables, symbols).shape == (2, 30, 6)
