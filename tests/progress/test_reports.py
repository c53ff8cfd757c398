"""Reports of a program: each step counts once in each pass, whatever the plan, the lowering and the transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bptt_jax
from bptt_jax._verify import check
from bptt_jax.plans import parse
from tests.support import comparison
from tests.support.progress import expected, leaves, recorded

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
rng = np.random.default_rng(0)
INIT, XS = rng.normal(size=3), rng.normal(size=(12, 3))
LONG = rng.normal(size=(100, 3))
STEP_BY_STEP = list(range(13))
TRANSFORMATIONS = {
    "grad": jax.grad,
    "jit": lambda f: jax.jit(jax.grad(f)),
    "vmap of grad": lambda f: lambda init: jax.vmap(jax.grad(f))(jnp.stack([init, init]))[0],
    "grad of vmap": lambda f: jax.grad(lambda init: jnp.sum(jax.vmap(f)(jnp.stack([init, init])))),
    "vmap of jit": lambda f: lambda init: jax.vmap(jax.jit(jax.grad(f)))(jnp.stack([init, init]))[0],
    "vmaps": lambda f: lambda init: jax.vmap(jax.vmap(jax.grad(f)))(jnp.stack([init, init])[None])[0, 0],
    "vmap of vjp": lambda f: lambda init: jax.vmap(jax.vjp(f, init)[1])(jnp.ones(2))[0][0],
    "forward over reverse": lambda f: lambda init: jax.jvp(jax.grad(f), (init,), (init,))[1],
    "reverse over reverse": lambda f: jax.grad(lambda init: jnp.sum(jnp.sin(jax.grad(f)(init)))),
    "vmap of forward over reverse": lambda f: (
        lambda init: jax.vmap(lambda init: jax.jvp(jax.grad(f), (init,), (init,))[1])(jnp.stack([init, init]))[0]
    ),
}
PLANS = ["12", "(3*[4])", "(2*[2*[3]])", "(2*[5] + 2)", "(12*[1])"]


def step(carry, x):
    carry = jnp.tanh(carry + x)
    return carry, carry


def loss_by(scan, xs=XS, step=step):
    def loss(init):
        carry, ys = scan(step, init, xs)
        return jnp.sum(jnp.sin(ys)) + jnp.sum(carry)

    return loss


def shown(**options):
    return functools.partial(bptt_jax.scan, progress="training", **options)


def passes(f, *args):
    """The reports of both passes of a call."""
    with recorded() as found:
        jax.block_until_ready(f(*args))
    return found.done("forward"), found.done("backward")


@pytest.mark.one_in(19)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("lowering", ["sweep", "nested"])
@pytest.mark.parametrize("plan", PLANS)
def test_each_step_counts_once(plan, lowering, transformation):
    """A nest of few and long blocks reports from its steps."""
    options, transform = {"plan": plan, "lowering": lowering}, TRANSFORMATIONS[transformation]
    blocks = leaves(parse(plan)) if lowering == "sweep" else [(i, 1) for i in range(12)]
    with recorded() as found:
        ours = jax.block_until_ready(transform(loss_by(shown(**options)))(INIT))
    assert (found.done("forward"), found.done("backward")) == expected(blocks)
    assert {report[::2] for report in found.reports} == {("training", 12)}
    theirs = transform(loss_by(functools.partial(bptt_jax.scan, **options)))(INIT)
    comparison.assert_same(ours, theirs, tolerance=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("plan", "lowering", "blocks"),
    [
        ("(25*[4])", "sweep", None),
        ("(4*[4*[6]] + 4)", "sweep", None),
        ("(100*[1])", "sweep", None),
        ("(25*[4])", "nested", None),
        ("(5*[20])", "nested", [(i, 1) for i in range(100)]),
    ],
)
def test_about_ten_reports_in_a_pass(plan, lowering, blocks, reverse):
    """Of 100 steps, at each tenth or at the next block."""
    scan = shown(plan=plan, lowering=lowering, reverse=reverse)
    found = passes(jax.grad(loss_by(scan, LONG)), INIT)
    assert found == expected(blocks or leaves(parse(plan)), every=10)
    assert max(map(len, found)) <= 11


@pytest.mark.one_in(5)
@pytest.mark.parametrize("length", [1, 12, 97, 100, 1000])
def test_a_scan_that_is_not_differentiated(length):
    xs = rng.normal(size=(length, 3))
    for transform in (lambda f: f, jax.jit, lambda f: lambda init: jax.vmap(f)(jnp.stack([init, init]))):
        forward, backward = passes(transform(loss_by(shown(budget="1KiB"), xs)), INIT)
        assert forward == sorted(set(forward)), "each once, in order"
        assert (forward[0], forward[-1], backward) == (0 if length > 1 else 1, length, [])
        assert min(length - 1, 9) < len(forward) <= 13
    ours, theirs = (jax.jit(lambda i, scan=scan: scan(step, i, xs))(INIT) for scan in (shown(), lax.scan))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_no_steps():
    ours, theirs = (jax.grad(loss_by(scan, XS[:0]))(INIT) for scan in (shown(), lax.scan))
    comparison.assert_same(ours, theirs, tolerance=0)
    assert passes(loss_by(shown(), XS[:0]), INIT)[1] == []


@pytest.mark.one_in(7)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("jitted", [False, True])
def test_gradients_are_the_same_bits(plan, jitted):
    with recorded():
        for transform in (jax.value_and_grad, jax.jacrev):
            with_bar, without = (
                transform(loss_by(functools.partial(bptt_jax.scan, plan=plan, progress=progress)))
                for progress in ("training", None)
            )
            ours, theirs = ((jax.jit(f) if jitted else f)(INIT) for f in (with_bar, without))
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("options", [{}, {"plan": "(3*[4])"}, {"plan": "(3*[4])", "lowering": "nested"}], ids=str)
def test_nothing_is_added_where_it_is_off(options):
    def programs(**more):
        loss = loss_by(functools.partial(bptt_jax.scan, **options, **more))
        return [jax.jit(f).lower(INIT).as_text() for f in (loss, jax.grad(loss))]

    assert programs() == programs(progress=False) == programs(progress=None)
    for off, on in zip(programs(), programs(progress=True), strict=True):
        assert "callback" not in off
        assert "callback" in on


def test_forward_mode_has_the_forward_pass():
    f = loss_by(shown(plan="(3*[4])"))
    assert passes(lambda init: jax.jvp(f, (init,), (init,)), INIT) == ([0, 4, 8, 12], [])
    assert passes(jax.jit(jax.jacfwd(f)), INIT) == ([0, 4, 8, 12], [])


def test_a_step_without_reverse_mode_has_the_forward_pass():
    def looping(carry, x):
        return lax.while_loop(lambda carry: carry.sum() > 9, lambda carry: carry / 2, carry + x), None

    def f(init):
        return shown()(looping, init, XS)[0]

    assert passes(lambda init: jax.jvp(f, (init,), (init,)), INIT) == (STEP_BY_STEP, [])


def test_a_step_with_other_effects_has_the_forward_pass():
    """Gradients of it are JAX's own."""
    told = []

    def telling(carry, x):
        jax.experimental.io_callback(lambda _: told.append(1), None, x)
        return step(carry, x)

    assert passes(jax.grad(loss_by(shown(), step=telling)), INIT) == (STEP_BY_STEP, [])
    assert passes(jax.jit(loss_by(shown(), step=telling)), INIT) == (STEP_BY_STEP, [])
    assert len(told) == 12  # JAX drops them from gradients


def test_a_carry_without_gradients():
    """Only ys have cotangents: in the nest these report."""

    def counting(carry, x):
        return carry + 1, jnp.sin(x) * carry

    for lowering in ("sweep", "nested"):
        scan = shown(lowering=lowering, plan="(3*[4])")
        _, backward = passes(jax.grad(lambda xs, scan=scan: scan(counting, 0, xs)[1].sum()), XS)
        assert backward[-1] == 12
        assert backward == sorted(set(backward))
        assert len(backward) == (4 if lowering == "sweep" else 13)


@pytest.mark.parametrize("lowering", ["sweep", "nested"])
def test_callbacks_of_the_user_and_recomputation_are_apart_from_it(lowering):
    """Own callbacks run once a step with a bar too; where recomputation shows, it does not move the bar."""
    told = []

    def telling(carry, x):
        jax.debug.callback(lambda _: told.append(1), carry)
        return step(carry, x)

    f = loss_by(shown(plan="(2*[2*[3]])", lowering=lowering), step=telling)
    plain = passes(jax.grad(f), INIT)
    assert len(told) == 12
    with bptt_jax.show_recomputation():
        assert passes(jax.grad(f), INIT) == plain
    assert len(told) == 12 + {"sweep": 30, "nested": 36}[lowering]


def test_a_scan_within_the_step_of_another():
    """Its bar starts anew at each step, in the first pass only."""

    def outer(carry, x):
        return shown(plan="(2*[2])")(lambda c, _: (jnp.sin(c + x), None), carry, None, 4)[0], None

    f = jax.grad(lambda init: bptt_jax.scan(outer, init, XS, plan="(3*[4])")[0].sum())
    assert passes(f, INIT) == ([0, 1, 2, 3, 4] * 12, [])


def test_two_labels_and_calls_again():
    def f(init):
        first = bptt_jax.scan(step, init, XS, progress="first", plan="(3*[4])")[0]
        return bptt_jax.scan(step, first, XS, progress="second", plan="(2*[6])")[0].sum()

    gradient = jax.jit(jax.grad(f))
    with recorded() as found:
        for _ in range(3):
            gradient(INIT).block_until_ready()
    for direction in ("forward", "backward"):
        assert found.done(direction, "first") == [0, 4, 8, 12] * 3
        assert found.done(direction, "second") == [0, 6, 12] * 3


@pytest.mark.one_in(7)
@pytest.mark.parametrize("lowering", ["sweep", "nested"])
@pytest.mark.parametrize("budget", [12_000, 20_000, "30%"])
def test_bytes_are_within_the_budget(budget, lowering):
    """As XLA reports them for the whole gradient, callbacks included."""
    weight, xs = 0.3 * np.eye(16), rng.normal(size=(200, 2, 16))

    def loss(weight, xs, **options):
        carry = jnp.zeros((2, 16))
        return bptt_jax.scan(lambda c, x: (jnp.tanh(c @ weight + x), None), carry, xs, **options)[0].sum()

    options = {"budget": budget if isinstance(budget, str) else budget * (1 + 2 * (lowering == "nested"))}
    program = jax.jit(jax.grad(functools.partial(loss, progress="t", lowering=lowering, **options)))
    compiled = program.lower(weight, xs).compile()
    limit = options["budget"]
    if isinstance(limit, str):
        step_of = functools.partial(jax.tree.map, jnp.asarray)
        report = bptt_jax.explain(
            lambda c, x: (jnp.tanh(c @ step_of(weight) + x), None), jnp.zeros((2, 16)), xs, lowering=lowering, **options
        )
        limit = report.budget_bytes
    assert compiled.memory_analysis().temp_size_in_bytes <= limit
    ours, theirs = compiled(weight, xs), jax.grad(loss)(weight, xs)
    comparison.assert_same(ours, theirs, tolerance=1e-12)


def test_checks_run_nothing_and_serve_all_labels():
    f = {
        name: jax.jit(jax.grad(loss_by(functools.partial(bptt_jax.scan, budget=3_000, progress=name), LONG)))
        for name in ("a", "b")
    }
    with recorded() as found:
        f["a"].lower(INIT).compile()
        misses = check._measured.cache_info().misses
        f["b"].lower(INIT).compile()
        assert check._measured.cache_info().misses == misses
        assert list(bptt_jax.explain_calls(jax.grad(loss_by(shown(budget=3_000), LONG)), INIT)) == ["scan"]
        assert check._measured.cache_info().misses == misses
    assert found.reports == []


def test_a_scan_of_integers_and_keys_is_done_last():
    """Its results have no floats that the last report could wait for."""

    def draw(carry, _):
        key, tokens = carry
        key, own = jax.random.split(key)
        return (key, tokens + jax.random.randint(own, tokens.shape, 0, 3, tokens.dtype)), tokens

    def sample(key):
        return bptt_jax.scan(draw, (key, jnp.zeros(3, jnp.int32)), None, 200, progress="sample")

    done, _ = passes(jax.jit(sample), jax.random.key(0))
    assert done == sorted(done)
    assert (done[0], done[-1], len(set(done))) == (0, 200, len(done))
