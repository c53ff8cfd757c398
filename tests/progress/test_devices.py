"""On several devices a bar is moved by one of them, in a process of its own with four."""

import os
import subprocess
import sys

import pytest

ON_FOUR_DEVICES = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import bptt_jax
from tests.support.progress import recorded

mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
xs = np.ones((12, 4, 3), np.float32)

def loss(weight, xs, lowering):
    step = lambda c, x: (jnp.tanh(c @ weight + x), None)
    scan = functools.partial(bptt_jax.scan, plan="(3*[4])", lowering=lowering, progress="t")
    return scan(step, 0.0 * xs[0], xs)[0].sum()

for lowering in ("sweep", "nested"):
    gradient = jax.grad(functools.partial(loss, lowering=lowering))
    whole = P(None, ("a", "b"))
    by_shards = jax.shard_map(
        lambda w, xs: jax.lax.psum(gradient(jax.lax.pcast(w, ("a", "b"), to="varying"), xs), ("a", "b")),
        mesh=mesh, in_specs=(P(), whole), out_specs=P())
    partly = jax.shard_map(
        lambda w, xs: jax.lax.psum(gradient(jax.lax.pcast(w, "a", to="varying"), xs), "a"),
        mesh=mesh, in_specs=(P(), P(None, "a")), out_specs=P(), axis_names={"a"})
    by_pmap = lambda w, xs: jax.pmap(gradient, in_axes=(None, 1))(w, xs[:, :, None])
    for run in (jax.jit(gradient), jax.jit(by_shards), jax.jit(partly), by_pmap):
        with recorded() as found:
            jax.block_until_ready(run(jnp.eye(3), jax.device_put(xs, NamedSharding(mesh, whole))))
        n = 4 if lowering == "sweep" else 13
        forward, backward = found.done("forward"), found.done("backward")
        assert [len(forward), len(backward)] == [n, n], (forward, backward)
print("once")
"""


@pytest.mark.slow
def test_on_several_devices_one_of_them_counts():
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags}
    run = subprocess.run([sys.executable, "-c", ON_FOUR_DEVICES], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "once", run.stderr
