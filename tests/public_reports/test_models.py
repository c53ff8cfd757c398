"""`explain` of a model: a report for each layer and scan with a budget that its call meets, by path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bptt_jax

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
XS = jax.ShapeDtypeStruct((2, 30, 3), jnp.float32)


def summed(xs, budget="150%"):
    return bptt_jax.scan(lambda carry, x: (jnp.tanh(carry + x), None), jnp.zeros_like(xs[0]), xs, budget=budget)[0]


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, xs, train):
        hidden = bptt_jax.linen.RNN(nn.LSTMCell(8), budget="60%", name="rnn")(xs)
        return nn.Dropout(0.5, deterministic=not train)(hidden)


class Model(nn.Module):
    @nn.compact
    def __call__(self, xs, train=False):
        hidden = Encoder(name="encoder")(xs, train)
        hidden = bptt_jax.linen.rnn(budget="80%")(nn.GRUCell)(8)(hidden)
        return jax.vmap(summed)(hidden)


PATHS = ["encoder/rnn", "GRUCell_0", "Model"]


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0), XS)


def test_a_linen_model():
    """`explain(model, variables, xs)` was refused: the layer had to be made again, and its variables nested by hand."""
    model = Model()
    reports = bptt_jax.linen.explain(model, shapes_of(model), XS, train=True, rngs={"dropout": jax.random.key(0)})
    assert list(reports) == PATHS
    assert [report.measured_bytes <= report.budget_bytes for report in reports.values()] == [True] * 3
    layer = bptt_jax.linen.RNN(nn.LSTMCell(8), budget="60%")
    alone = bptt_jax.linen.explain(layer, shapes_of(layer), XS)
    assert (alone.plan, alone.measured_bytes) == (reports["encoder/rnn"].plan, reports["encoder/rnn"].measured_bytes)
    first, *_ = str(reports).splitlines()
    assert first.startswith("encoder/rnn  ")
    assert bptt_jax.plans.notation(alone.plan) in first


def test_an_nnx_model():
    """The paths are those of the model's attributes, also through `nnx.jit` and lists."""

    class Tagger(nnx.Module):
        def __init__(self, rngs):
            self.below = bptt_jax.nnx.RNN(nnx.LSTMCell(3, 8, rngs=rngs), budget="60%")
            self.above = nnx.List([bptt_jax.nnx.RNN(nnx.GRUCell(8, 8, rngs=rngs)), nnx.Linear(8, 2, rngs=rngs)])

        @nnx.jit
        def __call__(self, xs):
            return self.above[1](self.above[0](self.below(xs)))

    model = Tagger(nnx.Rngs(0))
    reports = bptt_jax.nnx.explain(model, XS)
    assert list(reports) == ["below", "above/0"]
    assert reports["above/0"].budget_bytes is None
    assert not model.below.path  # only the copy has names


def test_a_training_step():
    """A plain function that differentiates: what is reported is the gradient that it asks for."""
    model = Model()

    @jax.jit
    def gradient(variables, xs):
        return jax.grad(lambda variables: model.apply(variables, xs).sum())(variables)

    reports = bptt_jax.explain_calls(gradient, shapes_of(model), XS)
    assert list(reports) == ["Model/encoder/rnn", "Model/GRUCell_0", "Model"]
    # The first layer's inputs are data, so they have no gradient here.
    everything = bptt_jax.linen.explain(model, shapes_of(model), XS)
    assert reports["Model/encoder/rnn"].profile != everything["encoder/rnn"].profile
    assert reports["Model/GRUCell_0"].profile == everything["GRUCell_0"].profile


@pytest.mark.parametrize("jitted", [False, True])
def test_a_batch_under_vmap(jitted):
    """A gradient for each example: the report is of all examples, whether vmap comes early or late."""

    def loss(weight, xs):
        return summed(weight * xs, budget=None).sum()

    def bytes_of(examples):
        gradient = jax.grad(loss)
        gradient = jax.vmap(jax.jit(gradient) if jitted else gradient, (None, 0))
        xs = jax.ShapeDtypeStruct((examples, 40, 8), jnp.float32)
        (report,) = bptt_jax.explain_calls(gradient, 0.5 * jnp.ones(8), xs).values()
        return report.store_all_bytes

    assert bytes_of(16) == 2 * bytes_of(8)


def test_scans_of_one_name_and_scans_within_scans():
    """Two calls at one place are numbered; a scan in a scan's step has a report of its own."""

    def loss(xs):
        with jax.named_scope("twice"):
            outer = bptt_jax.scan(lambda carry, x: (carry + summed(x), None), jnp.zeros(8), xs)[0]
            return outer + summed(xs[0])

    reports = bptt_jax.explain_calls(loss, jax.ShapeDtypeStruct((5, 30, 8), jnp.float32))
    assert list(reports) == ["twice", "twice [2]", "twice [3]"]
    assert [bptt_jax.plans.length(report.plan) for report in reports.values()] == [5, 30, 30]


def test_arguments_that_are_no_arrays_and_functions_without_scans():
    """Flags and functions are handed on; without a scan the mapping is empty, and says so."""
    reports = bptt_jax.explain_calls(lambda xs, function, flag: function(xs) if flag else xs, XS, jnp.sin, flag=True)
    assert not reports
    assert str(reports) == "no scan of bptt_jax is called"


def test_a_budget_that_is_too_small_is_refused_at_once():
    """As `explain` of one scan."""
    with pytest.raises(bptt_jax.errors.BudgetError):
        bptt_jax.explain_calls(lambda xs: summed(xs, budget=64), XS)


def layers():
    """Calls with a first carry of a stack and of an LSTM, of both of Flax's libraries; and the text of the carry."""
    xs, rngs = jnp.ones((2, 30, 3), jnp.float32), nnx.Rngs(0)
    inner = "(float32[2,8], float32[2,8])"
    for cell, text in [
        (lambda: bptt_jax.linen.Stack([nn.LSTMCell(8), nn.GRUCell(6)]), f"({inner}, float32[2,6])"),
        (lambda: nn.LSTMCell(8), inner),
    ]:
        layer = bptt_jax.linen.RNN(cell())
        variables = layer.init(jax.random.key(0), xs)
        yield lambda carry, layer=layer, variables=variables: layer.apply(variables, xs, initial_carry=carry), text
    stack = bptt_jax.nnx.Stack([nnx.LSTMCell(3, 8, rngs=rngs), nnx.GRUCell(8, 6, rngs=rngs)])
    for cell, text in [(stack, f"({inner}, float32[2,6])"), (nnx.LSTMCell(3, 8, rngs=rngs), inner)]:
        layer = bptt_jax.nnx.RNN(cell)
        yield lambda carry, layer=layer: layer(xs, initial_carry=carry), text


@pytest.mark.parametrize("place", range(4))
def test_a_first_carry_that_does_not_fit(place):
    """A `Stack` with an `initial_carry` of another structure: "zip() argument 2 is shorter than argument 1"."""
    call, text = list(layers())[place]
    of_8, of_7 = (jnp.zeros((2, size), jnp.float32) for size in (8, 7))
    for carry in [of_8, (of_8,), ((of_8, of_8),), (of_8, of_8, of_8), ((of_8, of_8), of_7), (of_8, of_7), [of_8, of_8]]:
        with pytest.raises(TypeError) as raised:
            call(carry)
        assert str(raised.value).startswith("initial_carry is ")
        assert str(raised.value).endswith(f"and the cell's own is {text}: give one of the same structure and shapes.")


def test_other_errors_are_not_of_the_first_carry():
    """A first carry of another dtype works, so a budget that is too small is what the error is about."""
    layer, xs = bptt_jax.linen.RNN(nn.GRUCell(16), budget=1000), jnp.ones((2, 50, 8), jnp.float32)
    variables = layer.init(jax.random.key(0), xs)
    with jax.enable_x64(False), pytest.raises(bptt_jax.errors.BudgetError):
        jax.grad(lambda variables: layer.apply(variables, xs, initial_carry=np.zeros((2, 16))).sum())(variables)
