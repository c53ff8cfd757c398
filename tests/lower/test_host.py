"""Values kept on the host: gradients are those of `jax.lax.scan`, whatever lies there, and programs move just that."""

import functools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import bptt_jax
from bptt_jax.plans import length as length_of
from bptt_jax.plans import parse
from tests.support import comparison, targets
from tests.support.steps import case_named

PLANS = (
    "6@4",
    "6@[4]",
    "2@12",
    "24@1",
    "24@[1]",
    "1@24",
    "(3@[4] + 2@6)",
    "(2@[2*[3]] + 12)",
    "(2@[2*[3]] + 3@4)",
    "(2*[6] + 3@4)",
    "(3@(2 + 3) + 9)",
    "((2@4 + 2@[4]) + 2*[4])",
)
CARRIES = tuple(plan for plan in PLANS if plan.count("@") == plan.count("@["))


def assert_equals_lax_scan(name, derivative, tolerance=1e-12, reverse=False, **options):
    case, length = case_named(name, jnp.float64), length_of(parse(options["plan"]))
    ours = functools.partial(bptt_jax.scan, reverse=reverse, **options)
    theirs = functools.partial(lax.scan, reverse=reverse)
    results = [derivative(*comparison.make_loss(case, length, scan)) for scan in (ours, theirs)]
    comparison.assert_same(*results, tolerance=tolerance)


@pytest.mark.one_in(13)
@pytest.mark.parametrize(("name", "reverse"), [("mixed", False), ("outputs", True)])
@pytest.mark.parametrize("derivative", comparison.DERIVATIVES)
@pytest.mark.parametrize("plan", PLANS)
def test_sweeps_equal_lax_scan(plan, derivative, name, reverse):
    assert_equals_lax_scan(name, derivative, plan=plan, reverse=reverse)


@pytest.mark.one_in(11)
@pytest.mark.parametrize("derivative", comparison.DERIVATIVES)
@pytest.mark.parametrize("plan", CARRIES)
def test_nests_equal_lax_scan(plan, derivative):
    assert_equals_lax_scan("mixed", derivative, plan=plan, lowering="nested")


@pytest.mark.parametrize("plan", ["5@4", "(2@[4] + 3@4)"])
def test_random_keys_of_a_carry_may_lie_on_the_host(plan):
    def step(carry, x):
        key, h = carry
        key, own = jax.random.split(key)
        h = jnp.tanh(h + x) + 0.1 * jax.random.normal(own, h.shape, h.dtype)
        return (key, h), h

    def loss(scan, xs):
        (_, h), ys = scan(step, (jax.random.key(0), jnp.zeros(3)), xs)
        return jnp.sum(jnp.sin(h)) + jnp.sum(ys)

    xs = jnp.linspace(0, 1, 60).reshape(20, 3)
    scans = functools.partial(bptt_jax.scan, plan=plan), lax.scan
    comparison.assert_same(*(jax.grad(functools.partial(loss, scan))(xs) for scan in scans), tolerance=1e-12)


def test_the_nest_refuses_residuals_on_the_host():
    def loss(c):
        return bptt_jax.scan(lambda c, x: (jnp.sin(c), None), c, None, 12, plan="3@4", lowering="nested")[0]

    with pytest.raises(
        ValueError, match=r"the plan 3@4 keeps residuals on the host, and the nest .* carries there only"
    ):
        jax.grad(loss)(1.0)


MESHES = """
    import functools
    import jax, jax.numpy as jnp, numpy as np
    from jax import lax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    import bptt_jax

    jax.config.update("jax_enable_x64", True)
    draw = np.random.default_rng(0).normal
    w, init, xs = (jnp.asarray(draw(size=shape)) for shape in ((3, 3), (8, 3), (24, 8, 3)))

    def loss(scan, w, init, xs):
        def step(c, x):
            c = jnp.tanh(jnp.einsum("bi,io->bo", c, w) + x)
            return c, c * c
        c, ys = scan(step, init, xs)
        return jnp.sum(jnp.sin(c)) + jnp.sum(ys)

    expected = jax.grad(functools.partial(loss, lax.scan), (0, 1, 2))(w, init, xs)
    for plan in ("6@4", "6@[4]", "(2@[2*[3]] + 3@4)"):
        ours = functools.partial(loss, functools.partial(bptt_jax.scan, plan=plan))
        mesh = jax.make_mesh((4,), ("b",), (AxisType.Auto,))
        specs = P(), P("b"), P(None, "b")
        mapped = jax.shard_map(lambda *a: lax.psum(ours(*a), "b"), mesh=mesh, in_specs=specs, out_specs=P())
        found = jax.jit(jax.grad(mapped, (0, 1, 2)))(w, init, xs)
        explicit = jax.make_mesh((4,), ("b",), (AxisType.Explicit,))
        with jax.set_mesh(explicit):
            placed = [jax.device_put(a, P(*spec)) for a, spec in ((w, ()), (init, ("b",)), (xs, (None, "b")))]
            by_types = jax.jit(jax.grad(ours, (0, 1, 2)))(*placed)
        for one in (found, by_types):
            for a, b in zip(one, expected, strict=True):
                np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-12)
    print("equal")
"""


@pytest.mark.slow
def test_in_a_shard_map_and_on_an_explicit_mesh(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(MESHES)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr


def compiled_for_h100(plan, lowering=None):
    device = targets.or_skip(targets.h100)
    shape = functools.partial(
        jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device)
    )

    def loss(c, xs):
        scan = functools.partial(bptt_jax.scan, plan=plan, target=device, lowering=lowering)
        return jnp.sum(scan(lambda c, x: (jnp.tanh(c + x), None), c, xs)[0])

    return jax.jit(jax.grad(loss)).lower(shape((64, 256)), shape((1000, 64, 256))).compile()


@pytest.mark.parametrize("lowering", [None, "nested"])
def test_a_whole_program_for_an_h100_has_on_the_host_what_the_plan_says(lowering):
    """JAX adds no transfers to a program unless it finds one in it: our primitives show theirs."""
    for plan, on_host in (("100@[10]", 100 * 64 * 256 * 4), ("100*[10]", 0)):
        assert compiled_for_h100(plan, lowering).memory_analysis().host_temp_size_in_bytes == on_host


def test_an_h100_reads_values_of_a_block_back_while_another_runs():
    lines = compiled_for_h100("10@100").as_text().splitlines()
    starts = [i for i, line in enumerate(lines) if " = " in line and "dynamic-slice-start" in line.split(" = ")[0]]
    assert starts, "reads that the program need not wait for"
    for i in starts:
        name = lines[i].split()[0]
        done = next(j for j in range(i, len(lines)) if f"fusion-done({name})" in lines[j])
        assert any(" while(" in line for line in lines[i:done])
