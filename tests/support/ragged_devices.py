"""Gradients of sequences of several lengths, read backwards, whose batch is divided among four devices.

A program: prints, as JSON for `test_devices`, the collectives of arrays for each sharding and way.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.support.ragged_devices
"""

import functools
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from tests.support import comparison
from tests.support.collectives import collectives

BATCH, LENGTH, WIDTH = 8, 64, 16
PLAN = Chain((Repeat(7, Remat(Steps(8))), Steps(8)))


def loss(options: dict[str, Any], variables: Any, xs: Any, carry: Any, lengths: Any) -> Any:
    layer = bptt_jax.linen.RNN(nn.GRUCell(WIDTH), reverse=True, keep_order=True, **options)
    ys = layer.apply(variables, xs, initial_carry=carry, seq_lengths=lengths)
    return jnp.sum(jnp.sin(ys)) / BATCH


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    xs = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
    variables = nn.RNN(nn.GRUCell(WIDTH, param_dtype=jnp.float64)).init(jax.random.key(1), xs)
    arguments = variables, xs, jnp.zeros((BATCH, WIDTH)), jnp.arange(BATCH, dtype=jnp.int32) * 9
    report = {}
    for options in ({"plan": PLAN}, {"plan": PLAN, "lowering": "nested"}):
        gradient = jax.jit(jax.grad(functools.partial(loss, options), (0, 1)))
        whole = jax.device_get(gradient(*arguments))
        for kind in (AxisType.Explicit, AxisType.Auto):
            mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
            shardings = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",))]
            placed = [jax.device_put(a, shardings[i > 0]) for i, a in enumerate(arguments)]
            with jax.set_mesh(mesh):
                compiled = gradient.lower(*placed).compile()
            comparison.assert_same(jax.device_get(compiled(*placed)), whole, tolerance=1e-10)
            found = [one for one in collectives(compiled.as_text()) if one.result_bytes > 8]
            report[f"{options.get('lowering')} {kind.name}"] = [[one.kind, one.loops] for one in found]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
