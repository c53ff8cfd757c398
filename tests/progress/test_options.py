"""Values of `progress=`, names of bars, and calls without a compiled program."""

import jax
import numpy as np
import pytest

import bptt_jax
from tests.progress.test_reports import INIT, STEP_BY_STEP, XS, loss_by, passes, shown, step
from tests.support.progress import recorded

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")


def test_without_jit():
    """`jax.disable_jit`: Python runs the steps and reports them; the backward pass is JAX's."""
    with jax.disable_jit():
        assert passes(jax.grad(loss_by(shown(plan="(3*[4])"))), INIT) == (STEP_BY_STEP, [])
        assert passes(lambda xs: shown(in_axes=1)(step, INIT, xs)[0], XS.T) == (STEP_BY_STEP, [])
        counted = passes(lambda init: shown()(lambda c, _: (c + 1, None), init, None, 4)[0], INIT)
        assert counted == ([0, 1, 2, 3, 4], [])


def test_an_unknown_number_of_steps_has_no_bar():
    (steps,) = jax.export.symbolic_shape("steps")
    xs = jax.ShapeDtypeStruct((steps, 3), np.float64)
    with pytest.raises(ValueError, match="there is no bar: leave out progress="):
        jax.export.export(jax.jit(lambda xs: shown()(step, INIT, xs)))(xs)


@pytest.mark.parametrize("progress", [0, 1.5, "", b"training", ["training"], 3])
def test_other_values_are_refused(progress):
    message = 'progress must be a label such as "training", True, False or None, got '
    with pytest.raises(TypeError, match=message):
        bptt_jax.scan(step, INIT, XS, progress=progress)
    with pytest.raises(TypeError, match=message):
        bptt_jax.checkpointed(progress=progress)


def test_names_for_true():
    @bptt_jax.checkpointed(progress=True, plan="(3*[4])")
    def my_model(carry, x):
        return step(carry, x)

    with recorded() as found:
        jax.grad(lambda init: my_model(init, XS)[0].sum())(INIT)
        bptt_jax.scan(step, INIT, XS, progress=np.True_)
    assert (found.done("forward", "my_model"), found.done("backward", "my_model")) == ([0, 4, 8, 12],) * 2
    assert found.done("forward", "scan") == STEP_BY_STEP
