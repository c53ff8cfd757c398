"""Bars of progress of Linen's and NNX's layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bptt_jax
from tests.support import comparison
from tests.support.progress import recorded

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
XS = jnp.ones((2, 12, 3), jnp.float32)
BLOCKS = [0, 4, 8, 12]


def linen_gradient(layer):
    variables = layer.init(jax.random.key(0), XS)
    return lambda: jax.grad(lambda variables: layer.apply(variables, XS).sum())(variables)


def nnx_gradient(layer):
    return lambda: nnx.grad(lambda layer: layer(XS).sum())(layer)


MADE = {
    "linen.RNN": lambda **o: linen_gradient(bptt_jax.linen.RNN(nn.GRUCell(4), **o)),
    "linen.rnn": lambda **o: linen_gradient(bptt_jax.linen.rnn(**o)(nn.GRUCell)(4)),
    "nnx.RNN": lambda **o: nnx_gradient(bptt_jax.nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), **o)),
    "nnx.rnn": lambda **o: nnx_gradient(bptt_jax.nnx.rnn(**o)(nnx.GRUCell)(3, 4, rngs=nnx.Rngs(0))),
}


@pytest.mark.one_in(11)
@pytest.mark.parametrize(("progress", "label"), [("encoder", "encoder"), (True, "GRUCell"), (None, None)])
@pytest.mark.parametrize("made", MADE)
def test_layers(made, progress, label):
    gradient = MADE[made](plan="(3*[4])", progress=progress)
    with recorded() as found:
        ours = gradient()
    found.reports = [one for one in found.reports if one[1] == "backward" or one[3] in BLOCKS]
    assert {one[0] for one in found.reports} == ({label} if label else set())
    assert found.done("backward") == (BLOCKS if label else [])
    comparison.assert_same(ours, MADE[made](plan="(3*[4])")(), tolerance=1e-6)


@pytest.mark.parametrize("make", [bptt_jax.linen.rnn, bptt_jax.nnx.rnn])
def test_malformed_values_are_refused_at_once(make):
    with pytest.raises(TypeError, match="progress must be a label"):
        make(progress=5)


def test_reports_are_of_the_program_with_the_bar():
    layer = bptt_jax.linen.RNN(nn.GRUCell(4), progress="encoder", budget="80%")
    variables = layer.init(jax.random.key(0), XS)
    with recorded() as found:
        report = bptt_jax.linen.explain(layer, variables, XS)
    assert report.measured_bytes <= report.budget_bytes
    assert found.reports == []


@pytest.mark.slow
def test_two_layers_have_a_bar_each():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs):
            for name in ("lower", "upper"):
                xs = bptt_jax.linen.RNN(nn.GRUCell(3), plan="(3*[4])", progress=name)(xs)
            return xs

    gradient = linen_gradient(Model())
    with recorded() as found:
        gradient()
    assert [found.done("backward", name) for name in ("lower", "upper")] == [BLOCKS, BLOCKS]
