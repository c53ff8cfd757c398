"""Situations of public bug reports, questions and requests about scans and recurrent layers, beside JAX and Flax."""

import functools
import pydoc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax
from jax.experimental import io_callback

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from tests.support import comparison
from tests.support.steps import normal

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
INIT, XS = np.random.default_rng(0).normal(size=8), np.random.default_rng(1).normal(size=(40, 8))
SINGLE = XS[None].astype(np.float32)  # for layers, with weights in single precision
WAYS = [{}, {"budget": "60%"}, {"budget": "60%", "lowering": "nested"}, {"plan": Repeat(4, Remat(Steps(10)))}]


def step(carry, x):
    carry = jnp.tanh(carry + x)
    return carry, carry


def equal_gradients(step, init, **options):
    def loss(scan, init):
        carry, ys = scan(step, init, XS)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((carry, ys)))

    ours = jax.value_and_grad(functools.partial(loss, functools.partial(bptt_jax.scan, **options)))(init)
    comparison.assert_same(ours, jax.value_and_grad(functools.partial(loss, lax.scan))(init), tolerance=1e-12)


def test_every_argument_by_keyword():
    """A call with the names of `jax.lax.scan` for all arguments."""
    carry, _ = bptt_jax.scan(f=step, init=INIT, xs=XS, length=40, reverse=False, unroll=1, budget="60%")
    comparison.assert_same(carry, lax.scan(f=step, init=INIT, xs=XS)[0], tolerance=1e-12)
    assert bptt_jax.explain(f=step, init=INIT, xs=XS, reverse=True, plan=Steps(40)).plan == Steps(40)
    assert bptt_jax.checkpointed(step)(init=INIT, xs=XS, reverse=True)[0].shape == (8,)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("options", WAYS[:3], ids=str)
def test_a_step_that_reads_numbers_without_jit(options):
    """A Python `if` on the carry, and `float` of it, under `jax.disable_jit`, also in a gradient."""

    def reads(carry, x):
        return (step if float(x.sum()) > -1e9 else None)(carry, x)

    with jax.disable_jit():
        carry, _ = bptt_jax.scan(reads, INIT, XS, **options)
        equal_gradients(step, INIT, **options)
        layer = bptt_jax.linen.RNN(nn.GRUCell(4), budget="60%")
        assert layer.apply(layer.init(jax.random.key(0), SINGLE), SINGLE).shape == (1, 40, 4)
    comparison.assert_same(carry, lax.scan(step, INIT, XS)[0], tolerance=1e-12)


class Converting:
    """A pytree whose constructor converts and asserts, as classes of users do."""

    def __init__(self, state, gain):
        self.state, self.gain = jnp.asarray(state), jnp.broadcast_to(gain, (2,))
        assert self.state.ndim == 1


jax.tree_util.register_pytree_node(
    Converting, lambda made: ((made.state, made.gain), None), lambda _, leaves: Converting(*leaves)
)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_carry_whose_class_converts_its_leaves(options):
    """Unflattening calls a constructor with `jnp.asarray` and `jnp.broadcast_to`."""

    def converting(carry, x):
        return Converting(jnp.tanh(carry.state + x), 1.1 * carry.gain), carry.state * carry.gain[0]

    equal_gradients(converting, Converting(INIT, jnp.ones(2)), **options)
    bptt_jax.explain(converting, Converting(INIT, jnp.ones(2)), XS, **options)


def test_a_step_that_fails_is_called_once():
    """A slow step with a mistake in it: its error comes at once."""
    calls = []

    def fails(carry, x):
        calls.append(1)
        raise KeyError("mistake")

    for scan in (bptt_jax.scan, functools.partial(bptt_jax.scan, budget="50%"), bptt_jax.explain):
        calls.clear()
        with pytest.raises(KeyError, match="mistake"):
            scan(fails, INIT, XS)
        assert len(calls) == 1


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    "transform",
    [
        jax.grad,
        lambda loss: jax.jit(jax.grad(loss)),
        lambda loss: jax.vmap(jax.grad(loss)),
        jax.hessian,
        lambda loss: lambda init: jax.jvp(loss, (init,), (init,)),
        lambda loss: lambda init: jax.linearize(loss, init)[1](init),
        lambda loss: lambda init: bptt_jax.explain_calls(loss, init),
    ],
)
def test_scans_in_scans_in_scans_call_the_innermost_step_at_most_twice(transform):
    """A step that is slow to trace, at the bottom of four scans within each other."""
    calls = []

    def nested(depth):
        if depth == 0:
            return lambda carry, _: (calls.append(1), (jnp.tanh(carry), None))[1]
        return lambda carry, _: bptt_jax.scan(nested(depth - 1), carry, None, 3)

    transform(lambda init: bptt_jax.scan(nested(3), init, None, 3, budget="200%")[0].sum())(normal(0, 5, 8))
    assert 1 <= len(calls) <= 2


@pytest.mark.slow
def test_nothing_leaks_from_a_layers_gradient():
    """`jax.checking_leaks` around the gradient of a Linen and of an NNX layer."""
    inputs = normal(0, 2, 30, 3).astype(jnp.float32)
    with jax.checking_leaks():
        layer = bptt_jax.linen.RNN(nn.LSTMCell(4), budget="60%")
        variables = layer.init(jax.random.key(0), inputs)
        jax.grad(lambda variables: layer.apply(variables, inputs).sum())(variables)
        model = bptt_jax.nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), budget="60%")
        nnx.grad(lambda model: model(inputs).sum())(model)


@pytest.mark.one_in(15)
@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", ["evaluated", "jit", "gradient", "jvp"])
def test_a_reference_that_the_step_writes(form, reverse, options):
    """A `jax.new_ref` in the closure: as in `jax.lax.scan`, or, within a budget, an error that names references."""

    def run(scan):
        ref = jax.new_ref(jnp.zeros(8))

        def writes(carry, x):
            ref[...] = 0.9 * ref[...] + x
            return jnp.tanh(carry + x), lax.stop_gradient(ref[...])

        def loss(init):
            carry, ys = scan(writes, init, XS, reverse=reverse)
            return carry.sum() + ys.sum()

        forms = {"evaluated": loss, "jit": jax.jit(loss), "gradient": jax.grad(loss)}
        forms["jvp"] = lambda init: jax.jvp(loss, (init,), (jnp.ones_like(init),))
        return forms[form](INIT), ref[...]

    scan = functools.partial(bptt_jax.scan, **options)
    if options and form in ("gradient", "jvp"):
        with pytest.raises(NotImplementedError, match=r"effects \(references\).*Leave out budget= and plan="):
            run(scan)
    else:
        comparison.assert_same(run(scan), run(lax.scan), tolerance=1e-12)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("flag", ["time_major", "return_carry", "reverse", "keep_order"])
@pytest.mark.parametrize("given", ["10%", 2, None])
def test_a_flag_that_is_no_bool(flag, given):
    """`linen.RNN(cell, "10%")`: a budget in the place of `time_major` swapped axes without a word."""
    cell, inputs = nn.LSTMCell(8), SINGLE
    meant = rf"{flag} must be True or False, got {given!r}"
    if given is not None:  # in a call None stands for the layer's own
        layer = bptt_jax.linen.RNN(cell)
        for call in (layer.apply, functools.partial(bptt_jax.linen.explain, layer)):
            with pytest.raises(TypeError, match=meant):
                call(bptt_jax.linen.RNN(cell).init(jax.random.key(0), inputs), inputs, **{flag: given})
        with pytest.raises(TypeError, match=meant):
            bptt_jax.nnx.RNN(nnx.LSTMCell(8, 8, rngs=nnx.Rngs(0)))(inputs, **{flag: given})
    for make in (functools.partial(bptt_jax.linen.RNN, cell), bptt_jax.linen.rnn, bptt_jax.nnx.rnn):
        with pytest.raises(TypeError, match=meant):
            make(**{flag: given})
    if flag == "time_major" and given == "10%":
        with pytest.raises(TypeError, match=r"Did you mean budget='10%'\?"):
            bptt_jax.linen.RNN(cell, given)


def test_numpy_bools_are_flags():
    layer = bptt_jax.linen.RNN(nn.LSTMCell(8), reverse=np.bool_(True))
    assert layer.apply(layer.init(jax.random.key(0), SINGLE), SINGLE).shape == (1, 40, 8)


@pytest.mark.parametrize("name", ["length", "reverse", "unroll"])
def test_a_budget_in_the_place_of_another_argument(name):
    """`scan(step, init, xs, "20%")`: the fourth argument is the length."""
    for call in (bptt_jax.scan, bptt_jax.explain):
        with pytest.raises(TypeError, match=rf"got {name}='20%'. Did you mean budget='20%'\?"):
            call(step, INIT, XS, **{name: "20%"})


def test_a_plan_in_its_notation():
    """`plan="(3*[10] + 10)"`, as `explain` prints it."""
    line, plan = "(3*[10] + 10)", Chain((Repeat(3, Remat(Steps(10))), Steps(10)))
    assert bptt_jax.explain(step, INIT, XS, plan=line).plan == plan
    equal_gradients(step, INIT, plan=line)
    layer = bptt_jax.linen.RNN(nn.GRUCell(4), plan=line)
    assert layer.apply(layer.init(jax.random.key(0), SINGLE), SINGLE).shape == (1, 40, 4)
    with pytest.raises(ValueError, match="the plan has 30 steps, but the scan has 40"):
        bptt_jax.scan(step, INIT, XS, plan="3*[10]")
    with pytest.raises(ValueError, match=r"3\*\[10"):
        bptt_jax.scan(step, INIT, XS, plan="3*[10")


@pytest.mark.parametrize(
    ("budget", "meant"),
    [
        ("10Mi", r"Did you mean '10MiB'\?"),
        ("3g", r"Did you mean '3GB'\?"),
        ("1e6", r"Did you mean 1000000, or '1000000B'\?"),
        ("1.5", r"It has no unit: did you mean '1.5%', or '1.5GiB'\?"),
        ("64", r"Did you mean 64, or '64B'\?"),
        ("-3", r"None for no limit\.$"),
        ("much", r"None for no limit\.$"),
    ],
)
def test_a_budget_without_its_unit(budget, meant):
    with pytest.raises(ValueError, match=meant):
        bptt_jax.scan(step, INIT, XS, budget=budget)


def test_a_shape_in_the_place_of_inputs():
    """`linen.explain(layer, variables, (4, 100, 16))`."""
    meant = r"got \(4, 100, 16\). Did you mean jax.ShapeDtypeStruct\(\(4, 100, 16\), jnp.float32\)\?"
    with pytest.raises(TypeError, match=meant):
        bptt_jax.linen.explain(bptt_jax.linen.RNN(nn.LSTMCell(4)), {}, (4, 100, 16))
    with pytest.raises(TypeError, match=meant):
        bptt_jax.nnx.explain(bptt_jax.nnx.RNN(nnx.GRUCell(16, 4, rngs=nnx.Rngs(0))), (4, 100, 16))


@pytest.mark.one_in(7)
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_callback_with_a_result(options, ordered):
    """`io_callback` in a step: once a step if evaluated; within a budget a gradient is refused, with the effect."""
    seen = []

    def logs(carry, x):
        read = io_callback(
            lambda value: (seen.append(1), value)[1], jax.ShapeDtypeStruct((8,), x.dtype), x, ordered=ordered
        )
        return jnp.tanh(carry + read), None

    scan = functools.partial(bptt_jax.scan, logs, xs=XS, **options)
    comparison.assert_same(jax.block_until_ready(scan(INIT)[0]), lax.scan(step, INIT, XS)[0], tolerance=1e-12)
    assert len(seen) == 40
    gradient = jax.grad(lambda init: scan(init)[0].sum())
    if options:
        with pytest.raises(NotImplementedError, match=rf"effects \({'Ordered' * ordered}IO\).*Leave out budget="):
            gradient(INIT)
    elif not ordered:  # JAX has no derivative of ordered ones
        theirs = jax.grad(lambda init: lax.scan(step, init, XS)[0].sum())(INIT)
        comparison.assert_same(gradient(INIT), theirs, tolerance=1e-12)


def test_a_loop_without_reverse_mode_says_so_before_budgets():
    """A `while_loop` in the step, `budget="50%"`: JAX's error, not one about the budget."""

    def loops(carry, x):
        return lax.while_loop(lambda value: value.sum() < 0, lambda value: value + 1, carry) + x, None

    with pytest.raises(ValueError, match=r"Reverse-mode differentiation does not work for lax\.while_loop"):
        jax.grad(lambda init: bptt_jax.scan(loops, init, XS, budget="50%")[0].sum())(INIT)


def test_linearize():
    """`jax.linearize(f, x)[1](v)` within a budget is the derivative."""

    def loss(scan, init):
        return scan(step, init, XS)[0].sum()

    ours, theirs = (
        jax.linearize(functools.partial(loss, scan), INIT)[1](XS[0])
        for scan in (functools.partial(bptt_jax.scan, budget="80%"), lax.scan)
    )
    comparison.assert_same(ours, theirs, tolerance=1e-12)


@pytest.mark.parametrize("module", [bptt_jax.linen, bptt_jax.nnx, bptt_jax.plans, bptt_jax.planners])
def test_modules_list_their_public_names(module):
    """`dir(bptt_jax.linen)` had 24 names for 5."""
    assert dir(module) == sorted(module.__all__)


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    "options", [{}, {"plan": Repeat(5, Remat(Steps(4)))}, {"budget": "50%", "verify": False}], ids=str
)
@pytest.mark.parametrize("differentiated", [False, True])
def test_an_export_for_any_batch(options, differentiated):
    """`jax.export` with a symbolic batch: the values and gradients of Flax's layer for batches of 3 and 5."""
    cell = nn.LSTMCell(4, param_dtype=jnp.float64)
    layer, flax = bptt_jax.linen.RNN(cell, **options), nn.RNN(cell)
    variables = flax.init(jax.random.key(0), normal(0, 3, 20, 6))

    def program(layer):
        def loss(variables, inputs):
            return jnp.sum(jnp.sin(layer.apply(variables, inputs)))

        return jax.jit(jax.grad(loss) if differentiated else layer.apply)

    any_batch = jax.ShapeDtypeStruct((*export.symbolic_shape("batch"), 20, 6), jnp.float64)
    exported = export.export(program(layer))(variables, any_batch)
    for batch in (3, 5):
        inputs = normal(1, batch, 20, 6)
        theirs = program(flax)(variables, inputs)
        comparison.assert_same(exported.call(variables, inputs), theirs, tolerance=1e-12)


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "options", [{"budget": 100_000}, {"budget": 100_000, "verify": False}, {"budget": "50%"}], ids=str
)
def test_an_export_for_any_batch_within_bytes(options):
    """A budget that depends on a size that is not known."""
    any_batch = jax.ShapeDtypeStruct((*export.symbolic_shape("batch"), 8), jnp.float64)
    gradient = jax.grad(lambda init: bptt_jax.scan(lambda c, x: step(c, x.sum()), init, XS, **options)[0].sum())
    with pytest.raises(
        ValueError, match=r"cannot be kept, because the sizes of .*\[batch,8\].* are not known. Give a plan"
    ):
        export.export(jax.jit(gradient))(any_batch)


def test_a_check_is_logged(caplog):
    """5 to 16 seconds without a word for a new batch size: `logging` tells of each program that is compiled."""
    with caplog.at_level("INFO", logger="bptt_jax"):
        jax.grad(lambda init: bptt_jax.scan(lambda c, x: step(c, 3 * x), init, XS, budget="80%")[0].sum())(INIT)
    (record, *_) = caplog.records
    assert "compiled a scan of 40 steps with plan" in record.getMessage()


def test_help_is_a_page():
    """`help(bptt_jax)` began with one line, and then listed modules."""
    lines = pydoc.getdoc(bptt_jax).splitlines()
    assert 15 <= len(lines) <= 40
    named = {name for name in bptt_jax.__all__ if any(name in line for line in lines)}
    assert {"scan", "checkpointed", "explain", "explain_calls", "make_plan", "profile", "errors", "plans"} <= named
