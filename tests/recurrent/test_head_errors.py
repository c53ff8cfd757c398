"""What is no head, or does not fit one, is told in the words of the call, by the layers of both libraries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import bptt_jax
import bptt_jax.linen
import bptt_jax.nnx

XS = jnp.ones((2, 30, 3), jnp.float32)
PACKAGES = ["linen", "nnx"]


@pytest.fixture(autouse=True)
def flax_promotion():
    """Flax's initialisers mix dtypes under x64."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")


def with_target(y, target):
    return (y - target) ** 2


def layer(package, head=None, **options):
    if package == "linen":
        return bptt_jax.linen.RNN(linen.GRUCell(4), head=head, **options)
    return bptt_jax.nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), head=head, **options)


def call(package, layer, xs=XS, **arrays):
    if package == "linen":
        return layer.init_with_output(jax.random.key(0), xs, **arrays)[0]
    return layer(xs, **arrays)


def dense(package):
    return linen.Dense(5) if package == "linen" else nnx.Linear(4, 5, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("head", "match"),
    [
        (lambda own, other: 3, r"head must be a flax\.\w+ module or a function of each step's output, got 3, which"),
        (lambda own, other: type(own), r"head must be a module or a function, got the class \w+; give an instance"),
        (lambda own, other: other, r"got flax's (Linear of flax\.nnx|Dense of flax\.linen), for which .* bptt_jax\."),
    ],
)
def test_what_is_no_head(package, head, match):
    other = PACKAGES[1 - PACKAGES.index(package)]
    with pytest.raises(TypeError, match=match):
        layer(package, head(dense(package), dense(other)))


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("head", "inputs", "error", "match"),
    [
        (None, np.ones((2, 30)), TypeError, r"head_inputs are for a layer with a head, and this one has none"),
        (with_target, None, TypeError, r"head with_target\(y, target\) needs an input for each step; .* head_inputs="),
        (
            jnp.tanh,
            np.ones((2, 30)),
            TypeError,
            r"the head tanh\(x.*\) takes the output alone, and the call has head_i",
        ),
        (lambda: 0, None, TypeError, r"the head <lambda>\(\) cannot be called as head\(y\)"),
        (lambda a, b, c: 0, XS, TypeError, r"the head <lambda>\(a, b, c\) cannot be called as head\(y, head_input\)"),
        (
            with_target,
            np.ones((2, 29)),
            ValueError,
            r"head_inputs must have .* \(\*batch, time, \.\.\.\), .* \(2, 30\), ",
        ),
        (
            with_target,
            {"a": XS, "b": np.ones((30, 2, 4))},
            ValueError,
            r"head_inputs\['b'\] must have .* \(2, 30\), got \(30, 2, 4\)",
        ),
        (with_target, [XS, 0.5], TypeError, r"head_inputs\[1\] must be an array \(\*batch, time, \.\.\.\), got 0\.5"),
        (
            lambda y: y.sum(),
            None,
            ValueError,
            r"needs the batch's axes, \(2,\), first.* shape \(\)\. With time_major=Tr",
        ),
    ],
)
def test_what_does_not_fit_a_head(package, head, inputs, error, match):
    with pytest.raises(error, match=match):
        call(package, layer(package, head), head_inputs=inputs)


@pytest.mark.parametrize("package", PACKAGES)
def test_sequences_with_orders_of_their_own_need_outputs_of_their_own(package):
    order = {"time_major": True, "reverse": True, "seq_lengths": jnp.array([30, 7])}
    mean = layer(package, lambda y: y.mean())
    assert call(package, mean, jnp.moveaxis(XS, 1, 0), **order).shape == (30,)
    with pytest.raises(ValueError, match=r"shape \(\)\. With reverse without keep_order it needs none"):
        call(package, mean, jnp.moveaxis(XS, 1, 0), keep_order=True, **order)
    with pytest.raises(
        ValueError, match=r"\(time, \*batch, \.\.\.\), so a shape that begins with \(30, 2\), got \(2, 30\)"
    ):
        call(package, layer(package, with_target), jnp.moveaxis(XS, 1, 0), head_inputs=jnp.ones((2, 30)), **order)


@pytest.mark.parametrize("package", PACKAGES)
def test_layers_of_a_decorator_have_no_head(package):
    library, flax = (bptt_jax.linen, linen) if package == "linen" else (bptt_jax.nnx, nnx)
    made = library.rnn(flax.GRUCell)
    plain = made(4) if package == "linen" else made(3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"layer with a head, and this one has none: RNN\(cell, head=\.\.\.\)"):
        call(package, plain, head_inputs=np.ones((2, 30)))
    with pytest.raises(TypeError, match="unexpected keyword argument 'head'"):
        library.rnn(head=jnp.tanh)


GLOBAL = nnx.Linear(4, 5, rngs=nnx.Rngs(0))


class Loss(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(4, 5, rngs=nnx.Rngs(0))

    def of(self, y):
        return self.dense(y)


def reads_default(y, dense=GLOBAL):
    return dense(y)


def heads_with_hidden_modules():
    local = [Loss()]
    yield lambda y: GLOBAL(y)
    yield lambda y: local[0].of(y)
    yield local[0].of
    yield reads_default
    yield functools.partial(lambda module, y: module.of(y), local[0])
    yield jax.jit(lambda y: local[0].of(y))


@pytest.mark.parametrize("head", list(heads_with_hidden_modules()), ids=range(6))
def test_functions_that_read_nnx_modules_are_refused(head):
    """Copies of a layer, as `nnx.grad` makes one, would read the state of the module that was there before."""
    with pytest.raises(
        TypeError, match=r"reads the module (Linear|Loss), of whose variables .* Make the head a module"
    ):
        layer("nnx", head)


def test_functions_that_read_bound_linen_modules_are_refused():
    """Initialised within the scan, their variables would be tracers of it."""

    class Model(linen.Module):
        by_method: bool

        def setup(self):
            self.dense = linen.Dense(5)
            head = self.loss if self.by_method else lambda y: self.dense(y)
            self.rnn = bptt_jax.linen.RNN(linen.GRUCell(4), head=head)

        def loss(self, y):
            return self.dense(y)

        def __call__(self, xs):
            return self.rnn(xs)

    for by_method in (False, True):
        with pytest.raises(TypeError, match="reads the module Model, of whose variables the layer would not know"):
            Model(by_method).init(jax.random.key(0), XS)
    # One without variables of its own is as good as any function.
    dense = linen.Dense(5)
    params = dense.init(jax.random.key(0), jnp.ones((2, 4)))
    assert call("linen", layer("linen", lambda y: dense.apply(params, y))).shape == (2, 30, 5)


def test_a_head_with_a_module_of_its_parent_is_refused():
    class Head(linen.Module):
        dense: linen.Module

        def __call__(self, y):
            return self.dense(y)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, xs):
            return bptt_jax.linen.RNN(linen.GRUCell(4), head=Head(linen.Dense(5)))(xs)

    with pytest.raises(NotImplementedError, match="the head Head has the module Dense_0, which belongs to a parent"):
        Model().init(jax.random.key(0), XS)
