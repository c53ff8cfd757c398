"""Gradients under `shard_map` and under explicit sharding. A program, for the four fake devices must be made first.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.support.adversarial.sharded

The batch is divided among the devices, weights are on each. Prints a line for each step and plan, and fails loudly.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from tests.support import comparison
from tests.support.adversarial.running import run_each
from tests.support.adversarial.table import draw

PLANS = {
    "blocks": Repeat(3, Remat(Steps(4))),
    "remainder": Chain((Repeat(3, Remat(Steps(3))), Steps(3))),
    "one block": Steps(12),
    "nest": Repeat(2, Remat(Repeat(2, Remat(Steps(3))))),
}
BATCH, WEIGHT, MEMORY = PartitionSpec(None, "batch"), PartitionSpec(), PartitionSpec("batch")


def step(params, carry, x):
    """Products that can be hoisted, deferred and merged; a read-only leaf; an invariant output and a product as one."""
    h, scale = carry
    a, b = h @ params["a"], h @ params["b"]
    h = jnp.tanh(a + jax.nn.sigmoid(b) * (x @ params["v"]) + scale * params["c"])
    return (h, scale), (h, x @ params["v"], jnp.sin(params["c"]))


def without_gradients(params, carry, x):
    """Matrices and terms that the step makes itself, or that are stopped, beside one that is not."""
    h, scale = carry
    h = jnp.tanh(h @ (0.5 * jnp.eye(3)) + x @ lax.stop_gradient(params["v"]) + scale * lax.stop_gradient(params["c"]))
    return (h, scale), (h, x @ jnp.tri(3), params["c"] * 1.0)


def unread(params, carry, x):
    """A weight and a leaf of the carry that nothing reads, another of which what is made is dropped."""
    h, scale = carry
    jnp.sin(h @ params["b"])
    h = jnp.tanh(h @ params["a"] + x)
    return (h, scale), (h, 2 * h, params["c"] * 1.0)


CASES = [(step, name) for name in PLANS] + [(without_gradients, "remainder"), (unread, "remainder")]


def arguments():
    params = {name: draw(i, 3, 3, scale=0.5) for i, name in enumerate("abv")} | {"c": draw(3, 3)}
    return params, (draw(4, 8, 3), draw(5, 8, 3)), draw(6, 12, 8, 3)


def loss(scan, of, params, init, xs):
    carry, (ys, products, invariant) = scan(functools.partial(of, params), init, xs)
    of_each_example = jnp.sum(jnp.sin(ys) * jnp.cos(products), axis=(0, 2)) * init[1][:, 0]
    return of_each_example.sum() + jnp.sum(carry[0] * carry[1]) + ys.shape[1] * jnp.sum(invariant)


def gradient(scan, of):
    return jax.value_and_grad(functools.partial(loss, scan, of), argnums=(0, 1, 2))


def sharded_gradient(scan, of, mesh):
    """Each device's share of the loss; the shares are added, and with them the gradients of the weights."""

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(WEIGHT, MEMORY, BATCH), out_specs=(WEIGHT, (WEIGHT, MEMORY, BATCH))
    )
    def shares(params, init, xs):
        value, gradients = gradient(scan, of)(params, init, xs)
        return lax.psum(value, "batch"), gradients

    return shares


def noting_types(function, types):
    """`function`, which when it is traced adds the types of its results, with their shardings, to a list."""

    def noted(*arguments):
        results = function(*arguments)
        types.extend(str(jax.typeof(leaf)) for leaf in jax.tree.leaves(results))
        return results

    return noted


def check_shard_map(scan, of, whole):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    (ours,) = run_each((sharded_gradient(scan, of, mesh), *arguments()))
    comparison.assert_same(ours, whole, 1e-10)


def check_explicit_sharding(scan, of, whole):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
    types, expected_types = [], []
    with jax.set_mesh(mesh):
        divided = [
            jax.device_put(tree, NamedSharding(mesh, spec))
            for tree, spec in zip(arguments(), (WEIGHT, MEMORY, BATCH), strict=True)
        ]
        calls = (
            (noting_types(gradient(f, of), seen), *divided) for f, seen in ((scan, types), (lax.scan, expected_types))
        )
        ours, theirs = run_each(*calls)
    assert types == expected_types, (types, expected_types)
    assert "batch" in "".join(types)
    placed, expected = ([leaf.sharding for leaf in jax.tree.leaves(tree)] for tree in (ours, theirs))
    assert placed == expected, (placed, expected)
    for reference in (theirs, whole):
        comparison.assert_same(*map(jax.device_get, (ours, reference)), 1e-10)
    with jax.set_mesh(mesh):
        several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), divided[0])
        batched = (jax.vmap(gradient(f, of), (0, None, None)) for f in (scan, lax.scan))
        comparison.assert_same(*map(jax.device_get, run_each(*((f, several, *divided[1:]) for f in batched))), 1e-10)


def main():
    jax.config.update("jax_enable_x64", True)
    assert jax.device_count() == 4, "set XLA_FLAGS=--xla_force_host_platform_device_count=4"
    for of, name in CASES:
        (whole,) = run_each((gradient(lax.scan, of), *arguments()))
        scan = functools.partial(bptt_jax.scan, plan=PLANS[name])
        check_shard_map(scan, of, whole)
        check_explicit_sharding(scan, of, whole)
        print("equal:", of.__name__, name)


if __name__ == "__main__":
    main()
