"""A training step's gradient on 256 TPUs v5e that need not be here: bytes of a chip, and what chips send each other.

An LSTM of 1024 features over 1000 steps of a batch of 4096, which is divided among 256 chips; or among 16, the hidden
dimension being divided among the other 16. Inputs are bfloat16: of others XLA makes a copy in bfloat16, as a whole.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import bptt_jax
from tests.support import targets
from tests.support.collectives import collectives, in_loops

LENGTH, BATCH, WIDTH = 1000, 4096, 1024
CHIPS = {"batch": (256, 1), "hidden": (16, 16)}  # along the batch and along the hidden dimension
XS, CARRY = PartitionSpec(None, "batch"), PartitionSpec("batch", "hidden")
BUDGET = 128 << 20
# Under automatic sharding a budget counts global arrays.
BUDGETS = {"explicit": BUDGET, "shard_map": BUDGET, "automatic": 128 * BUDGET}
# Of the biases of an LSTM whose hidden dimension is divided among 16: JAX 0.10 cannot type the reshape that Flax makes
# of a sharded bias so that its gradient waits, so that is summed over devices once per segment.
BIASES = 4 * WIDTH // 16 * 4


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users run."""


@functools.cache
def compiled(mode, layout, is_ours):
    """The gradient of the weights, with the loss on the last carry."""
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = Mesh(np.array(targets.v5e_pod()).reshape(CHIPS[layout]), ("batch", "hidden"), axis_types=(kind, kind))
    options = {"time_major": True, "return_carry": True}
    cell = nn.LSTMCell(WIDTH)
    budget = {"budget": BUDGETS[mode], "verify": False}  # checks would be compiled for the CPU
    layer = bptt_jax.linen.RNN(cell, **options, **budget) if is_ours else nn.RNN(cell, **options)

    def weights(leaf):
        return PartitionSpec(*[None] * (leaf.ndim - 1), "hidden") if layout == "hidden" else PartitionSpec()

    def typed(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def gradient(variables, carry, xs):
        return jax.grad(lambda v: jnp.sum(layer.apply(v, xs, initial_carry=carry)[0][1]))(variables)

    xs = jax.ShapeDtypeStruct((LENGTH, BATCH, WIDTH), jnp.bfloat16)
    variables = jax.eval_shape(nn.RNN(cell, **options).init, jax.random.key(0), xs)
    specs = jax.tree.map(weights, variables)
    run = gradient
    if mode == "shard_map":
        run = jax.shard_map(gradient, mesh=mesh, in_specs=(specs, (CARRY, CARRY), XS), out_specs=specs)
    carry = (typed(jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32), CARRY),) * 2
    arguments = jax.tree.map(typed, variables, specs), carry, typed(xs, XS)
    with targets.planning_for("tpu"):
        if mode != "explicit":
            return jax.jit(run).lower(*arguments).compile()
        with jax.set_mesh(mesh):
            return jax.jit(run).lower(*arguments).compile()


def all_reduces(found, looped):
    """The bytes of their results, in loops or outside of any, each as often as it stands there."""
    sizes = [one.result_bytes for one in found if one.kind == "all-reduce" and bool(one.loops) == looped]
    return [size for size in sizes if looped or size > 16]  # a number tells that the cotangents are there


CASES = (("explicit", "batch"), ("shard_map", "batch"), ("automatic", "batch"), ("explicit", "hidden"))


@pytest.mark.parametrize(("mode", "layout"), [*CASES, ("automatic", "hidden")])
def test_on_256_chips(request, mode, layout):
    ours, theirs = targets.or_skip(lambda: [compiled(mode, layout, is_ours) for is_ours in (True, False)])
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (ours, theirs)]
    found, expected = (collectives(program.as_text()) for program in (ours, theirs))
    print(f"{mode}, {layout}: {sizes[0]:,} bytes of a chip, flax.linen.RNN {sizes[1]:,}")
    for whose, ones in (("ours", found), ("flax.linen.RNN", expected)):
        print(whose, sorted((one.kind, len(one.loops), one.result_bytes) for one in ones))
    assert sizes[0] <= BUDGET < sizes[1] / 4
    assert [one for one in found if one.kind != "all-reduce" and not one.loops] == []
    if mode == "automatic":
        reason = "XLA moves a reduction out of one loop only, and types do not tell what is divided among devices"
        request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason))
    assert {one.kind for one in in_loops(found)} <= {one.kind for one in in_loops(expected)}
    # The gradients of the weights, once; in loops the cotangent of the hidden state, at each step backward.
    biases = [BIASES] if (mode, layout) == ("explicit", "hidden") else []
    # A segment of its own at the end, which not each plan has, is outside of loops.
    once = sum(all_reduces(expected, looped=False))
    assert sum(all_reduces(found, looped=False)) in {once, once + sum(biases)}
    assert set(all_reduces(found, looped=True)) <= {*all_reduces(expected, looped=True), *biases}
