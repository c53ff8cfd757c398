"""Bad input: every message says what was asked, what was found, and what would work."""

import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, StepProfile, Steps
from bptt_jax.errors import BudgetError

XS = jnp.ones((100, 4))
INIT = jnp.ones(4)
PROFILE = StepProfile(carry_bytes=10, residual_bytes=40)


def step(carry, x):
    return jnp.sin(carry) * x, None


def scan(**options):
    return bptt_jax.scan(step, INIT, XS, **options)


def gradient(**options):
    return jax.grad(lambda init: jnp.sum(bptt_jax.scan(step, init, XS, **options)[0]))(INIT)


@pytest.mark.parametrize("run", [scan, lambda **o: bptt_jax.make_plan(PROFILE, 100, **o)], ids=["scan", "make_plan"])
@pytest.mark.parametrize(
    ("budget", "error", "text"),
    [
        (-5, ValueError, "budget=-5 is -5 bytes, but a budget must be positive; use bytes as an int, a string"),
        (0, ValueError, "budget=0 is 0 bytes, but a budget must be positive"),
        ("0%", ValueError, "budget='0%' is 0 bytes, but a budget must be positive"),
        ("12 parsecs", ValueError, "unknown unit 'parsecs'; the units are %, B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"),
        (
            "12MIB",
            ValueError,
            "unknown unit 'MIB'; the units are %, B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, KB. Did you mean '12MiB'?",
        ),
        (
            "5 percent",
            ValueError,
            "unknown unit 'percent'; the units are %, B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, KB. Did you mean '5%'?",
        ),
        ("10M", ValueError, "Did you mean '10MB'?"),
        ("2 gigabytes", ValueError, "Did you mean '2GB'?"),
        ("Auto", ValueError, "Did you mean 'auto'?"),
        ("none", ValueError, "Did you mean None?"),
        (0.05, TypeError, "Did you mean '5%'?"),
        (1e6, TypeError, "Did you mean 1000000?"),
        ("lots", ValueError, "budget='lots' is not a budget; use bytes as an int"),
        ("-5MiB", ValueError, "budget='-5MiB' is not a budget"),
        ("64", ValueError, "budget='64' is not a budget; use bytes as an int"),
        ("64", ValueError, "Did you mean 64, or '64B'?"),
        ("automatic", ValueError, "budget='automatic' is not a budget"),
        (1.5, TypeError, "budget=1.5 of type float is not a budget; use bytes as an int"),
        (True, TypeError, "budget=True of type bool is not a budget"),
    ],
)
def test_malformed_budgets(run, budget, error, text):
    with pytest.raises(error, match=re.escape(text)):
        run(budget=budget)


def test_budget_too_small():
    with pytest.raises(
        BudgetError, match=r"no plan for a scan of length 100 fits budget=1, which is 1 byte; the"
    ) as info:
        gradient(budget=1)
    error = info.value
    assert error.budget_bytes == 1
    assert f"budget={error.smallest_bytes}" in str(error)
    gradient(budget=error.smallest_bytes)
    with pytest.raises(BudgetError):
        gradient(budget=error.smallest_bytes // 2)
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.smallest_bytes) == (str(error), error.smallest_bytes)


@pytest.mark.parametrize("asked", ["0.5%", "1%", "0.3 %", "2%"])
@pytest.mark.parametrize("residual_bytes", [1, 2, 3, 40])
def test_the_percentage_that_would_do_does(asked, residual_bytes):
    profile = StepProfile(carry_bytes=10, residual_bytes=residual_bytes)
    with pytest.raises(BudgetError) as info:
        bptt_jax.make_plan(profile, 30, asked)
    (percentage,) = re.findall(r'or "([\d.]+%)"', str(info.value))
    bptt_jax.make_plan(profile, 30, percentage)


@pytest.mark.parametrize("lowering", [None, "sweep", "nested"])
def test_a_call_that_is_not_differentiated_fits_any_budget(lowering):
    reference = lax.scan(step, INIT, XS)[0]
    assert jnp.array_equal(scan(budget=1, lowering=lowering)[0], reference)
    with pytest.raises(BudgetError):
        gradient(budget=1, lowering=lowering)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"budget": "1MiB", "plan": Steps(100)}, ValueError, "got budget='1MiB' and a plan: a plan is run as it is"),
        ({"plan": Steps(99)}, ValueError, "the plan has 99 steps, but the scan has 100."),
        ({"plan": 100}, TypeError, "its notation as a string, or None, got 100."),
        ({"lowering": "forward"}, ValueError, "lowering='forward' is unknown; use None (the sweep"),
    ],
)
def test_options(options, error, text):
    for call in (scan, lambda **o: bptt_jax.explain(step, INIT, XS, **o)):
        with pytest.raises(error, match=re.escape(text)):
            call(**options)
    with pytest.raises(error, match=re.escape(text)):
        bptt_jax.checkpointed(step, **options)(INIT, XS)


def drop_leaf(state, x):
    return {"h": state["h"]}, None


def cast_leaf(state, x):
    return {"h": state["h"].astype(jnp.float16), "c": state["c"]}, None


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda scan: scan(step, INIT, {"a": XS, "b": XS[:7]}), "different leading axis sizes: 100, 7"),
        (lambda scan: scan(step, INIT, XS, length=7), "`length` argument of 7 which disagrees with leading axis sizes"),
        (lambda scan: scan(step, INIT), "no values to scan over and `length` not provided"),
        (lambda scan: scan(step, INIT, 3.0), "no leading axis to scan over: 3.0"),
        (lambda scan: scan(lambda carry, x: carry, INIT, XS), "scan body output must be a pair, got float32[4]"),
        (lambda scan: scan(drop_leaf, {"h": INIT, "c": INIT}, XS), "state"),
        (lambda scan: scan(cast_leaf, {"h": INIT, "c": INIT}, XS), "carry component state['h'] has type float32[4]"),
        (lambda scan: scan(3, INIT, XS), "should be a callable"),
        (lambda scan: scan(step, INIT, XS, unroll=-1), "`unroll` must be a `bool` or a non-negative `int`"),
    ],
)
def test_the_errors_of_lax_scan(call, text):
    """The same exception as `jax.lax.scan`, to the letter, in the user's names."""
    with pytest.raises(Exception, match=re.escape(text)) as theirs:
        call(lax.scan)
    with pytest.raises(type(theirs.value)) as ours:
        call(bptt_jax.scan)
    assert str(ours.value) == str(theirs.value)


def test_decorated_step_with_params_errs_in_the_users_names():
    run = bptt_jax.checkpointed(lambda params, state, x: cast_leaf(state, x), params=True)
    with pytest.raises(TypeError, match=re.escape("carry component state['h'] has type")):
        run(0.0, {"h": INIT, "c": INIT}, XS)


def test_exceptions_of_the_step_come_through():
    class MineError(Exception):
        pass

    def failing(carry, x):
        raise MineError("mine")

    with pytest.raises(MineError, match="mine"):
        bptt_jax.scan(failing, INIT, XS)


@jax.custom_vjp
def doubled(v):
    return jnp.sin(v)


doubled.defvjp(lambda v: (jnp.sin(v), v), lambda v, ct: (2 * ct * jnp.cos(v),))


@pytest.mark.parametrize("options", [{}, {"budget": 3000}, {"plan": Repeat(10, Remat(Steps(10)))}])
def test_the_sweep_for_a_step_that_only_the_nest_takes_says_what_to_do(options):
    """One with a derivative rule of its own; a call that is not differentiated is the loop of `jax.lax.scan`."""

    def with_rule(carry, x):
        return doubled(carry) * x, None

    def loss(scan, **given):
        return lambda init: jnp.sum(scan(with_rule, init, XS, **given)[0])

    sweep = options | {"lowering": "sweep"}
    text = re.escape(
        'a derivative rule of its own, or effects, that only the nest takes; use lowering=None or "nested".'
    )
    with pytest.raises(ValueError, match=text):
        jax.grad(loss(bptt_jax.scan, **sweep))(INIT)
    with pytest.raises(ValueError, match=text):
        bptt_jax.explain(with_rule, INIT, XS, **sweep)
    assert jnp.array_equal(loss(bptt_jax.scan, **sweep)(INIT), loss(lax.scan)(INIT))
    for lowering in (None, "nested"):
        ours = jax.grad(loss(bptt_jax.scan, **options, lowering=lowering))(INIT)
        assert jnp.allclose(ours, jax.grad(loss(lax.scan))(INIT))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Steps(-1), ValueError, "Steps.n must be at least 0, got -1."),
        (lambda: Steps(1.5), TypeError, "Steps.n must be an integer, got 1.5 of type float."),
        (lambda: Repeat(0, Steps(1)), ValueError, "Repeat.k must be at least 1, got 0."),
        (lambda: Repeat(2, 5), TypeError, "Repeat.child must be a plan (Steps, Repeat, Chain or Remat), got 5."),
        (lambda: Chain(()), ValueError, "Chain.children must have at least one plan, got none."),
        (lambda: Chain((Steps(1), None)), TypeError, "each of Chain.children must be a plan"),
        (lambda: Remat("x"), TypeError, "Remat.child must be a plan"),
        (lambda: bptt_jax.cost(3, PROFILE), TypeError, "the plan must be a plan"),
        (lambda: bptt_jax.plans.render(3), TypeError, "the argument of render must be a plan"),
        (lambda: bptt_jax.plans.svg(Steps(3), width=0), ValueError, "width must be at least 600, got 0."),
        (lambda: bptt_jax.plans.svg(Steps(3), width="9"), TypeError, "width must be an integer, got '9' of type str."),
        (
            lambda: StepProfile(carry_bytes=-1, residual_bytes=0),
            ValueError,
            "StepProfile.carry_bytes must be at least 0",
        ),
        (lambda: bptt_jax.make_plan(PROFILE, -1), ValueError, "length must be at least 0, got -1."),
        (lambda: bptt_jax.make_plan(PROFILE, 10.0), TypeError, "length must be an integer, got 10.0 of type float."),
    ],
)
def test_plans_and_profiles(make, error, text):
    with pytest.raises(error, match=re.escape(text)):
        make()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda L: L.RNN(nn.Dense(3)), TypeError, "RNN.cell must be a recurrent cell such as flax.linen.LSTMCell"),
        (lambda L: L.RNN(nn.Dense(3)), TypeError, "an instance of Dense, which has no initialize_carry and no num_"),
        (
            lambda L: L.RNN(nn.GRUCell),
            TypeError,
            "RNN.cell must be a cell, got the class GRUCell; give an instance of it",
        ),
        (lambda L: L.rnn()(int), TypeError, "the class int, which is no flax.linen module."),
        (lambda L: L.rnn()(nn.GRUCell(3)), TypeError, "decorates a cell class, got an instance of GRUCell; for a cell"),
        (lambda L: L.rnn(budget="lots"), ValueError, "budget='lots' is not a budget"),
        (lambda L: L.RNN(nn.GRUCell(3), budget="lots"), ValueError, "budget='lots' is not a budget"),
        (
            lambda L: L.RNN(nn.GRUCell(3), variable_axes=3),
            TypeError,
            "variable_axes must map filters of collections to",
        ),
        (
            lambda L: L.RNN(nn.GRUCell(3), split_rngs="all"),
            TypeError,
            "split_rngs must map filters of collections to",
        ),
        (
            lambda L: L.explain(nn.GRUCell(3), {}, XS),
            TypeError,
            "explain needs a layer of bptt_jax.linen (RNN, or made",
        ),
    ],
)
def test_linen(make, error, text):
    with pytest.raises(error, match=re.escape(text)):
        make(bptt_jax.linen)


@pytest.mark.parametrize("inputs", [jnp.ones(()), jnp.ones(3)])
def test_inputs_without_time(inputs):
    text = re.escape(
        f"inputs of shape {inputs.shape} have no axis of time: num_feature_axes of the cell is 1, and inputs are ("
    )
    with pytest.raises(ValueError, match=text):
        bptt_jax.linen.RNN(nn.GRUCell(3)).init(jax.random.key(0), inputs)
    with pytest.raises(ValueError, match=text):
        bptt_jax.nnx.RNN(nnx.GRUCell(3, 3, rngs=nnx.Rngs(0)))(inputs)


@pytest.mark.parametrize("target", ["gpu", 3, []])
def test_a_target_that_is_no_device(target):
    with pytest.raises(TypeError, match=re.escape("target must be a device, such as one of jax.experimental.topolo")):
        bptt_jax.explain(lambda c, x: (c + x, None), jnp.zeros(3), XS, target=target)


def test_a_malformed_filter_of_collections():
    layer = bptt_jax.linen.RNN(nn.GRUCell(3), variable_broadcast=3)
    with pytest.raises(TypeError, match=r"a filter must be a bool, a name, names or a DenyList, .*, got 3\."):
        layer.init(jax.random.key(0), jnp.ones((2, 5, 3)))
