"""Functions jitted by Flax NNX and by Equinox, several devices, and devices that need not be here."""

import json
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import bptt_jax
from bptt_jax import largest_budget, scan
from tests.support import targets
from tests.whole.models import total_bytes

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")


class Net(nnx.Module):
    def __init__(self, budget, rngs):
        self.layer = bptt_jax.nnx.RNN(nnx.SimpleCell(4, 16, rngs=rngs), budget=budget)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, xs):
        return self.head(self.layer(xs)).sum()


def test_a_function_jitted_by_nnx_with_its_optimizer():
    def abstract(budget):
        def made():
            net = Net(budget, nnx.Rngs(0))
            return net, nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)

        return nnx.eval_shape(made)

    def make(budget):
        @nnx.jit(donate_argnums=(0, 1))
        def update(state, optimizer, xs):
            net = Net(budget, nnx.Rngs(0))
            nnx.update(net, nnx.state(state))
            loss, gradient = nnx.value_and_grad(lambda net: net(xs))(net)
            optimizer.update(state, gradient)
            return loss

        return update

    xs = jax.ShapeDtypeStruct((2, 400, 4), jnp.float32)
    _, report = largest_budget(make, *abstract(None), xs, within="150KiB")
    assert report.chosen.bytes.aliases > 0
    assert report.chosen.evaluations > 1
    assert 0.93 * 150 * 1024 <= report.chosen.total_bytes <= 150 * 1024


def test_a_function_jitted_by_equinox():
    def make(budget):
        def update(cell, xs):
            def loss(cell):
                run = lambda xs: scan(lambda c, x: (cell(x, c),) * 2, jnp.zeros(16, jnp.float32), xs, budget=budget)  # noqa: E731
                return run(xs)[1].sum()

            return eqx.filter_grad(loss)(cell)

        return eqx.filter_jit(update)

    cell, xs = eqx.nn.GRUCell(4, 16, key=jax.random.key(0), dtype=jnp.float32), jnp.zeros((1000, 4), jnp.float32)
    _, report = largest_budget(make, cell, xs, within="170KiB")
    assert report.chosen.evaluations > 1
    assert 0.93 * 170 * 1024 <= report.chosen.total_bytes <= 170 * 1024


def divided(mode):
    """Bytes of one of four devices, with each its part of a batch; a program for `test_on_four_devices`."""
    mesh = jax.make_mesh((4,), ("batch",))
    by_batch, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((None, "batch"), ()))

    def make(budget):
        def loss(w, xs):
            step = lambda c, x: (jnp.tanh(c @ w + x),) * 2  # noqa: E731
            return scan(step, jnp.zeros_like(xs[0]), xs, budget=budget)[1].mean()

        def update(w, xs):
            return w - jax.grad(loss)(w, xs)

        def mapped(w, xs):
            return jax.lax.pmean(update(w, xs), "batch")

        specs = {"mesh": mesh, "in_specs": (whole.spec, by_batch.spec), "out_specs": whole.spec}
        run = jax.shard_map(mapped, check_vma=False, **specs) if mode == "shard_map" else update
        return jax.jit(run, donate_argnums=0)

    w = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=whole)
    xs = jax.ShapeDtypeStruct((500, 8, 16), jnp.float32, sharding=by_batch)
    _, report = largest_budget(make, w, xs, within="156KiB")
    print(report, file=sys.stderr)
    arguments = report.chosen.bytes.arguments
    return {"total": total_bytes(report.chosen.compiled), "programs": len(report.programs), "arguments": arguments}


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("automatic", marks=pytest.mark.slow)])
def test_on_four_devices(mode):
    program = f"""
import json, jax
jax.config.update("jax_num_cpu_devices", 4)
from tests.whole.test_kinds import divided
print(json.dumps(divided({mode!r})))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["arguments"] == 16 * 16 * 4 + 500 * 2 * 16 * 4  # of one device
    assert 0.93 * 156 * 1024 <= found["total"] <= 156 * 1024
    assert found["programs"] <= 4


def make_for(target):
    def make(budget):
        def update(w, xs):
            def loss(w):
                step = lambda c, x: (jnp.tanh(c @ w + x),) * 2  # noqa: E731
                return scan(step, jnp.zeros((16, 128), jnp.float32), xs, budget=budget, target=target)[1].sum()

            return w - jax.grad(loss)(w)

        return jax.jit(update, donate_argnums=0)

    return make


@pytest.mark.parametrize("target", [targets.h100, pytest.param(targets.v5e, marks=pytest.mark.slow)])
def test_a_target_that_need_not_be_here(target):
    device = targets.or_skip(target)
    w, xs = jnp.zeros((128, 128), jnp.float32), jax.ShapeDtypeStruct((600, 16, 128), jnp.float32)
    within = 8 << 20
    _, report = largest_budget(make_for(device), w, xs, within=within, target=device)
    print(report)
    assert report.chosen.platforms == {device.platform}
    assert 0.93 * within <= report.chosen.total_bytes <= within
    assert "pass target=" not in str(report)
    _, report = largest_budget(make_for(None), w, xs, within=within, target=device)
    assert report.chosen.total_bytes <= within
    assert "its scans are planned for cpu: pass target= to them as well" in str(report)
