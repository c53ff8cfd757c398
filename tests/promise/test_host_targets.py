"""Two budgets are kept on an H100 and on a TPU v5e, which are compiled for and need not be here."""

import functools

import jax
import jax.numpy as jnp
import pytest

import bptt_jax
from bptt_jax.plans import notation
from tests.support import targets

BATCH, WIDTH = 64, 256
DEVICE = ("2%", "5%", "20%")
HOST = ("1%", "20%", "120%")  # the last has room for all residuals


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users run."""


def lstm(weights, carry, x):
    (w, u, b), (h, c) = weights, carry
    i, f, g, o = jnp.split(x @ w + h @ u + b[None], 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None


def gru(weights, h, x):
    w, u, b = weights
    of_x, of_h = jnp.split(x @ w + b[None], 3, -1), jnp.split(h @ u, 3, -1)
    r, z = (jax.nn.sigmoid(p + q) for p, q in zip(of_x[:2], of_h[:2], strict=True))
    return (1 - z) * jnp.tanh(of_x[2] + r * of_h[2]) + z * h, None


def report(cell, length, device, dtype=jnp.float32, **options):
    h = jnp.zeros((BATCH, WIDTH), jnp.float32)
    gates, init = (4, (h, h)) if cell is lstm else (3, h)
    weights = [jnp.zeros(shape, jnp.float32) for shape in ((WIDTH, gates * WIDTH),) * 2 + ((gates * WIDTH,),)]
    xs = jax.ShapeDtypeStruct((length, BATCH, WIDTH), dtype)
    return bptt_jax.explain(functools.partial(cell, weights), init, xs, target=device, **options)


@pytest.mark.slow
@pytest.mark.parametrize("budget", DEVICE, ids=lambda budget: budget.replace("%", "_percent"))
@pytest.mark.parametrize("length", [1000, 10_000])
@pytest.mark.parametrize("cell", [lstm, gru], ids=["lstm", "gru"])
@pytest.mark.parametrize("target", [targets.h100, targets.v5e], ids=["h100", "v5e"])
def test_bytes_of_both_memories_are_within_both_budgets(target, cell, length, budget):
    device, evaluations = targets.or_skip(target), []
    # A TPU's copy of long inputs in float32, see below, leaves no room for 2 %.
    dtype = jnp.bfloat16 if device.platform == "tpu" and length > 1000 else jnp.float32
    for host in HOST:
        found = report(cell, length, device, dtype, budget=budget, host_budget=host)
        evaluations.append(found.forward_steps / length)
        print(f"{cell.__name__}, {length} steps on {device}, {budget} and {host}: {notation(found.plan)}", end=", ")
        print(f"{found.measured_bytes:,} and {found.host_bytes:,} bytes, {evaluations[-1]:.3f} evaluations")
        assert found.checks
        assert found.measured_bytes + found.beside_bytes <= found.budget_bytes
        assert found.host_bytes <= found.host_budget_bytes
    assert evaluations == sorted(evaluations, reverse=True)
    assert evaluations[-1] == 1.0


def test_explain_shows_both_memories_of_an_h100():
    device = targets.or_skip(targets.h100)
    text = str(report(lstm, 1000, device, budget="5%", host_budget="20MiB"))
    for row in ("budget on the host", "predicted on the host", "measured on the host", "on the host for"):
        assert row in text


@pytest.mark.slow
def test_a_v5e_has_a_copy_of_long_inputs_in_bfloat16():
    device = targets.or_skip(targets.v5e)
    of_float32, of_bfloat16 = (
        report(lstm, 10_000, device, dtype, plan="(199*[50] + 50)").measured_bytes
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert (of_float32 - of_bfloat16) / (10_000 * BATCH * WIDTH * 2) == pytest.approx(1, rel=0.02)
