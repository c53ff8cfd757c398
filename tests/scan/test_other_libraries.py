"""Cells of Equinox and Haiku are steps like any other: scanned within a budget they give what `jax.lax.scan` gives."""

import functools
from collections.abc import Callable

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import bptt_jax
from tests.support import comparison
from tests.support.steps import Case, normal

BATCH, INPUTS, FEATURES = 4, 6, 8
LENGTH, BUDGET = 300, "10%"


class Readout(eqx.Module):
    """A GRU with a readout; the activation is a leaf that is no array."""

    cell: eqx.nn.GRUCell
    linear: eqx.nn.Linear
    activation: Callable

    def __init__(self, key):
        cell_key, linear_key = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(INPUTS, FEATURES, dtype=jnp.float64, key=cell_key)
        self.linear = eqx.nn.Linear(FEATURES, 3, dtype=jnp.float64, key=linear_key)
        self.activation = jax.nn.softplus

    def __call__(self, x, carry):
        carry = self.cell(x, carry)
        return carry, self.activation(self.linear(carry))


def inputs(length):
    return normal(3, length, BATCH, INPUTS, dtype=jnp.float64)


def a_carry(seed):
    return normal(seed, BATCH, FEATURES, dtype=jnp.float64)


def equinox_lstm():
    cell = eqx.nn.LSTMCell(INPUTS, FEATURES, dtype=jnp.float64, key=jax.random.key(0))

    def step(cell, carry, x):
        carry = jax.vmap(cell)(x, carry)  # Equinox's cells are for one example
        return carry, carry[0]

    return Case("equinox_lstm", step, cell, (a_carry(1), a_carry(2)), inputs)


def equinox_gru_with_readout():
    params, static = eqx.partition(Readout(jax.random.key(0)), eqx.is_inexact_array)

    def step(params, carry, x):
        return jax.vmap(eqx.combine(params, static))(x, carry)

    return Case("equinox_gru_with_readout", step, params, a_carry(1), inputs)


def haiku_lstm():
    def forward(carry, x):
        output, carry = hk.LSTM(FEATURES)(x, carry)
        return carry, output

    cell = hk.without_apply_rng(hk.transform(forward))
    init = hk.LSTMState(a_carry(1), a_carry(2))
    params = cell.init(jax.random.key(0), init, inputs(1)[0])
    return Case("haiku_lstm", cell.apply, params, init, inputs)


CASES = [equinox_lstm, equinox_gru_with_readout, haiku_lstm]


def budgeted(step, init, xs, length):
    return bptt_jax.scan(step, init, xs, length, budget=BUDGET)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("make_case", CASES)
def test_equals_lax_scan_in_a_tenth_of_its_bytes(make_case):
    case = make_case()
    programs = []
    for scan in (budgeted, lax.scan):
        loss, floats = comparison.make_loss(case, LENGTH, scan)
        programs.append(jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(floats).compile())
    comparison.assert_same(*[program(floats) for program in programs], tolerance=1e-12)

    step = functools.partial(case.step, case.params)
    report = bptt_jax.explain(step, case.init, case.xs(LENGTH), budget=BUDGET)
    ours, plain = (program.memory_analysis().temp_size_in_bytes for program in programs)
    print(f"{case}: {report.measured_bytes} of {report.budget_bytes}; with the loss {ours}, lax.scan {plain}")
    assert report.measured_bytes <= report.budget_bytes <= 0.1 * plain


@pytest.mark.one_in(5)
@pytest.mark.parametrize("make_case", [equinox_gru_with_readout, haiku_lstm])
def test_second_derivatives(make_case):
    case = make_case()
    results = [comparison.reverse_over_reverse(*comparison.make_loss(case, 100, scan)) for scan in (budgeted, lax.scan)]
    comparison.assert_same(*results, tolerance=1e-12)
