"""Programs for accelerators, run on CPU: unrolled loops, and packed writes of the values saved by a step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import bptt_jax
from bptt_jax._bench.cells import CELLS
from bptt_jax._device.machine import Machine
from bptt_jax._lower.loop import most_together
from bptt_jax._pipeline import fastest
from bptt_jax._step.packing import Packing
from bptt_jax._trace.gradient import gradient_of
from bptt_jax._trace.trace import trace
from tests.scan.test_transformations import in_a_way, reference, result_of
from tests.support import comparison
from tests.support.steps import normal
from tests.support.targets import planning_for
from tests.support.transformations import ROWS


@pytest.mark.one_in(11)
@pytest.mark.parametrize("limit", ["none", "plan", "budget"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_transformation(row, limit):
    """Iterations of five and of two steps, and one block of all steps."""
    name = row.steps[0]
    with planning_for("gpu"):
        ours = in_a_way(lambda scan: result_of(row, scan, name), None, limit)
    comparison.assert_same(ours, reference(row, name), 1e-9)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("plan", ["40", "(2*[16] + 8)", "2*[2*[10]]", "(13*[3] + 1)"])
def test_layers(plan, reverse):
    """A GRU's step saves arrays of one shape; here another of the carry is wider, and one is of whole numbers."""
    cell = nn.GRUCell(4, param_dtype=jnp.float64, dtype=jnp.float64)
    init, xs = jnp.zeros((3, 4)), normal(0, 40, 3, 4)
    variables = cell.init(jax.random.key(0), init, xs[0])

    def loss(scan, variables, xs):
        def step(carry, x):
            h, wide, count = carry
            h, _ = cell.apply(variables, h, x)
            wide = jnp.tanh(wide + jnp.pad(h, ((0, 0), (0, 2)))) * jnp.cos(count.astype(wide.dtype))
            return (h, wide, count + 1), h * wide[:, :4]

        carry, ys = scan(step, (init, jnp.ones((3, 6)), jnp.int32(0)), xs, reverse=reverse)
        return jnp.sum(carry[0] ** 2) + jnp.sum(jnp.sin(carry[1])) + jnp.sum(jnp.cos(ys))

    def gradient(scan):
        return jax.jit(jax.value_and_grad(functools.partial(loss, scan), (0, 1)))(variables, xs)

    with planning_for("gpu"):
        ours = gradient(functools.partial(bptt_jax.scan, plan=plan))
    comparison.assert_same(ours, gradient(lax.scan), 1e-10)


def gradient_for(cell, batch, width, platform, **options):
    problem = CELLS[cell](batch, width)
    found = []

    def inspect(params, init, xs):
        with planning_for(platform):
            unroll = options.get("unroll")
            checked = bptt_jax._options.checked_options()
            traced = trace(lambda c, x: problem.step(params, c, x), init, xs, None, False, unroll, checked)
        found.append(gradient_of(traced.call, traced.arguments))

    jax.eval_shape(inspect, problem.params, problem.init, problem.xs_shape(40))
    return found[0]


@pytest.mark.parametrize(("platform", "packs"), [("cpu", False), ("tpu", False), ("gpu", True)])
def test_a_gpu_writes_two_arrays_for_the_values_of_an_lstm(platform, packs):
    """The product of the last hidden state reads its array as it is, so it is not packed."""
    packing = Packing(fastest(gradient_for("lstm", 16, 64, platform)).vjp)
    assert len(packing.from_loop) >= 6  # it depends on JAX's derivatives
    assert packing.n_arrays == (2 if packs else len(packing.from_loop))


@pytest.mark.parametrize(
    ("platform", "cell", "width", "unroll", "steps"),
    [
        ("gpu", "lstm", 64, None, 4),
        ("tpu", "lstm", 64, None, 4),
        ("cpu", "lstm", 64, None, 1),
        ("gpu", "lstm", 2048, None, 1),  # 128 MiB of weights
        ("gpu", "lstm", 64, 1, 1),
        ("gpu", "lstm", 64, 7, 7),
        ("cpu", "lstm", 64, 7, 7),
    ],
)
def test_the_steps_of_an_iteration(platform, cell, width, unroll, steps):
    assert most_together(gradient_for(cell, 16, width, platform, unroll=unroll).call) == steps


@pytest.mark.parametrize(("equations", "steps"), [(17, 4), (300, 3), (600, 1), (5000, 1)])
def test_long_steps_are_not_unrolled(equations, steps):
    assert Machine("gpu").steps_together(1000, equations) == steps


def test_explain_shows_both():
    xs = jnp.zeros((40, 16, 8), jnp.float32)
    step = CELLS["lstm"](16, 8).step
    params, init = CELLS["lstm"](16, 8).params, CELLS["lstm"](16, 8).init
    with planning_for("gpu"):
        report = bptt_jax.explain(lambda c, x: step(params, c, x), init, xs)
    assert report.together == (4,)
    assert report.block.arrays == 2
    assert "steps in an iteration      4" in str(report)
    with planning_for("gpu"):
        cut = bptt_jax.explain(lambda c, x: step(params, c, x), init, xs, plan="(3*[10] + 7 + 3)")
    assert cut.together == (1, 3, 5)
    assert f"{report.block.saved} in 2 arrays" in str(report)
    assert "read ahead" not in str(report)
    on_cpu = str(bptt_jax.explain(lambda c, x: step(params, c, x), init, xs))
    assert "products of x, read ahead  yes" in on_cpu
    assert "steps in an iteration" not in on_cpu
    assert "values saved by a step" not in on_cpu
