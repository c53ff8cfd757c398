"""Whole training steps of Flax models with Adam: at most four programs, and the chosen one fills its limit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax
from bptt_jax import largest_budget, scan
from tests.whole.models import make_for, shapes_of, start, total_bytes

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")


@functools.cache
def unlimited(layers):
    """Bytes of the training step without a budget."""
    return total_bytes(make_for(layers)(None).lower(*shapes_of(start(layers))).compile())


@pytest.mark.one_in(21)
@pytest.mark.parametrize("share", [0.9, 0.8, 0.7, 0.65, 0.97])
@pytest.mark.parametrize("layers", [2, 1])
def test_the_chosen_program_fills_its_limit(layers, share):
    make, within = make_for(layers), int(share * unlimited(layers))
    arguments = shapes_of(start(layers))
    budget, report = largest_budget(make, *arguments, within=within)
    taken = total_bytes(make(budget).lower(*arguments).compile())
    print(f"{layers} layers within {within:,}: {taken / within:.3f} by {len(report.programs)} programs")
    assert taken == report.chosen.total_bytes
    assert 0.93 * within <= taken <= within
    assert len(report.programs) <= 4


@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_losses_are_those_without_a_budget(layers):
    (state, text), within, make = start(layers), int(0.8 * unlimited(layers)), make_for(layers)
    budget, report = largest_budget(make, state, text, within=within)
    assert not report.chosen.keeps_everything
    assert report.chosen.evaluations > 1
    losses = {}
    for name, update in {
        "ours": report.chosen.compiled,
        "again": make(budget),
        "plain": make(None),
    }.items():
        state, losses[name] = jax.tree.map(jnp.copy, start(layers)[0]), []
        for _ in range(4):
            state, loss = update(state, text)
            losses[name].append(float(loss))
    assert losses["ours"] == losses["again"]
    np.testing.assert_allclose(losses["ours"], losses["plain"], rtol=1e-5)
    assert losses["ours"][-1] < losses["ours"][0]


def test_a_program_that_fits_keeps_everything():
    budget, report = largest_budget(make_for(1), *shapes_of(start(1)), within=2 * unlimited(1))
    assert len(report.programs) == 1
    assert report.chosen.keeps_everything
    assert report.chosen.total_bytes == unlimited(1)
    assert str(report).splitlines()[-1] == (
        f"chosen: program 1, budget={budget}; its scans keep everything, as without a budget"
    )


def weights_and_inputs():
    return jax.ShapeDtypeStruct((64,), jnp.float32), jax.ShapeDtypeStruct((1000, 64), jnp.float32)


def make(budget, **options):
    """A step of gradient descent on one weight vector."""

    def update(w, xs):
        def loss(w):
            return scan(lambda c, x: (jnp.tanh(w * c + x),) * 2, jnp.zeros(64, jnp.float32), xs, budget=budget)[1].sum()

        return w - jnp.float32(0.1) * jax.grad(loss)(w)

    return jax.jit(update, **options)


def test_a_report_is_a_table():
    _, report = largest_budget(make, *weights_and_inputs(), within="700KiB")
    first, blank, heads, *rows = str(report).splitlines()
    assert first == "within 700 KiB (716,800 bytes) of one device"
    assert blank == ""
    columns = [
        "program",
        "budget",
        "arguments",
        "results",
        "aliases",
        "temporaries",
        "total",
        "of within",
        "evaluations",
    ]
    assert re.split("  +", heads) == columns
    assert [row.split()[0] for row in rows[: len(report.programs)]] == [
        str(i) for i in range(1, len(report.programs) + 1)
    ]
    chosen = rows[report.programs.index(report.chosen)]
    assert f"{report.chosen.total_bytes / 716_800:.3f}" in chosen
    assert f"{report.chosen.evaluations:.2f}" in chosen
    assert rows[len(report.programs)] == ""
    assert len({len(row) for row in (heads, *rows[: len(report.programs)])}) == 1
    assert f"budget={report.chosen.budget_bytes}" in rows[-1]


def test_donated_arguments_count_once():
    w, xs = jax.ShapeDtypeStruct((1 << 16,), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float32)

    def make(budget, **options):
        def update(w, xs):
            loss = lambda w: scan(lambda c, x: (c * x, None), w, xs, budget=budget)[0].sum()  # noqa: E731
            return w - jax.grad(loss)(w)

        return jax.jit(update, **options)

    _, kept = largest_budget(make, w, xs, within="16MiB")
    _, donated = largest_budget(functools.partial(make, donate_argnums=0), w, xs, within="16MiB")
    assert kept.chosen.bytes.aliases == 0
    assert donated.chosen.bytes.aliases == w.size * 4
    assert kept.chosen.bytes.results == donated.chosen.bytes.results == w.size * 4
    assert kept.chosen.total_bytes == total_bytes(kept.chosen.compiled)
    assert donated.chosen.total_bytes == total_bytes(donated.chosen.compiled)


def test_auto_is_the_room_of_the_device(monkeypatch):
    from bptt_jax._device import free_bytes

    monkeypatch.setattr(free_bytes, "_available_to_cpu", lambda: 1 << 20)
    w, xs = weights_and_inputs()
    _, report = largest_budget(make, w, xs, within="auto")
    assert report.within_bytes == 57 << 14  # 0.9 MiB, in six binary digits
    held = jnp.zeros(xs.shape, xs.dtype)
    _, with_arguments = largest_budget(make, w, held, within="auto")
    assert with_arguments.within_bytes == 35 << 15  # of 1 MiB and the 256,000 bytes held by xs


def test_with_jit_disabled_programs_are_compiled_all_the_same():
    with jax.disable_jit():
        _, report = largest_budget(make, *weights_and_inputs(), within="700KiB")
    assert report.chosen.total_bytes <= 700 * 1024


def test_a_scan_that_is_not_differentiated_leaves_nothing_to_give():
    forward = lambda budget: jax.jit(lambda xs: scan(lambda c, x: (c + x, c), 0.0, xs, budget=budget))  # noqa: E731
    _, report = largest_budget(forward, jax.ShapeDtypeStruct((100,), jnp.float64), within="1MiB")
    assert report.chosen.scans == 0
    assert "no scan" in str(report)
    assert "it differentiates no scan of bptt_jax, so any budget would do" in str(report)


def test_is_public():
    assert bptt_jax.largest_budget is largest_budget
    assert bptt_jax.FitReport.__name__ == "FitReport"
