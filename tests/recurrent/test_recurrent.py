"""What recurrent layers of both libraries share: lengths and resets are of the carry, not of a cell's variables."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from bptt_jax._recurrent.recurrence import Call, recurrence


@dataclasses.dataclass(frozen=True)
class Counting:
    """A cell whose carry sums x, and whose variables, without a batch, count steps and sum what is given."""

    carried: Any
    given: Any
    given_axes: Any = 1

    def step(self, carry, variables, x, given):
        variables = {"steps": variables["steps"] + 1, "sum": variables["sum"] + given}
        return carry + x, variables, carry, variables["steps"]

    def made_axes(self, made):
        return 0


def run(call, steps=5):
    xs = jnp.arange(1.0, 1 + 2 * steps).reshape(2, steps)
    variables = {"steps": jnp.int32(0), "sum": jnp.zeros(3)}
    given = jnp.broadcast_to(jnp.arange(float(steps)), (3, steps))
    return xs, recurrence(Counting(variables, given), jnp.zeros(2), xs, (2,), call, jnp.zeros(2)).run(unroll=1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 2]])
@pytest.mark.parametrize("resets", [None, [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0]]])
def test_variables_see_every_step_whatever_is_selected(reverse, lengths, resets):
    call = Call(
        return_carry=True,
        reverse=reverse,
        seq_lengths=None if lengths is None else jnp.array(lengths),
        resets=None if resets is None else jnp.array(resets, bool),
    )
    xs, (carry, variables, outputs, made) = run(call)
    assert int(variables["steps"]) == 5
    np.testing.assert_array_equal(variables["sum"], [10.0] * 3)
    np.testing.assert_array_equal(made, [1, 2, 3, 4, 5])
    assert outputs.shape == (2, 5)
    for row in range(2):
        order = list(range(5 if lengths is None else lengths[row]))
        total = 0.0
        for at in reversed(order) if reverse else order:
            total = float(xs[row, at]) + (0.0 if resets is not None and resets[row][at] else total)
        assert float(carry[row]) == total


def test_a_carry_without_the_batch_is_refused():
    call = Call(resets=jnp.zeros((2, 5), bool))
    with pytest.raises(ValueError, match=r"resets need carries with the batch's axes, \(2,\), first.*shape \(\)"):
        recurrence(Counting({}, None, None), jnp.zeros(()), jnp.zeros((2, 5)), (2,), call, jnp.zeros(()))
