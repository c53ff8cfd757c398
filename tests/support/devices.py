"""A Flax RNN on several devices, its batch or its hidden dimension divided among them, and the same on one.

What is compared is the vjp of the scan alone: its arguments and results are not temporaries, so what XLA reports for it
is what a budget bounds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import bptt_jax
from tests.support.steps import normal

LENGTH, BATCH, FEATURES, WIDTH = 96, 8, 8, 16
AXIS = "devices"  # of the mesh
_OPTIONS: dict[str, Any] = {"time_major": True, "return_carry": True}


class GatheringCell(nn.RNNCellBase):
    """An Elman cell that holds a part of the hidden dimension on each device of a `shard_map`.

    Attributes:
      features: of the part.
      axis: the axis of the mesh to gather over; None where the part is the whole.
    """

    features: int
    axis: str | None = None

    @nn.compact
    def __call__(self, carry: Any, x: Any) -> Any:
        whole = carry if self.axis is None else lax.all_gather(carry, self.axis, axis=-1, tiled=True)
        recurrent = nn.Dense(self.features, use_bias=False, name="recurrent", param_dtype=carry.dtype)(whole)
        carry = nn.tanh(nn.Dense(self.features, name="input", param_dtype=carry.dtype)(x) + recurrent)
        return carry, carry

    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> Any:
        return jnp.zeros((*input_shape[:-1], self.features))

    num_feature_axes = 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays are divided among devices.

    Attributes:
      weights: from the rank of a parameter to how it is divided.
      carry, xs, ys: likewise, for them.
    """

    weights: Callable[[int], PartitionSpec]
    carry: PartitionSpec
    xs: PartitionSpec
    ys: PartitionSpec

    def arguments(self, arguments: Any) -> Any:
        """The partitions of (variables, carry, xs, (cotangents of the carry, of ys))."""
        variables, carry, _, _ = arguments
        weights = jax.tree.map(lambda leaf: self.weights(leaf.ndim), variables)
        carries = jax.tree.map(lambda leaf: self.carry, carry)
        return weights, carries, self.xs, (carries, self.ys)

    def results(self, arguments: Any) -> Any:
        """The partitions of what `vjp` returns."""
        weights, carries, xs, outs = self.arguments(arguments)
        return outs, (weights, carries, xs)


LAYOUTS = {
    "batch": Layout(
        weights=lambda rank: PartitionSpec(),
        carry=PartitionSpec(AXIS),
        xs=PartitionSpec(None, AXIS),
        ys=PartitionSpec(None, AXIS),
    ),
    "hidden": Layout(
        weights=lambda rank: PartitionSpec(*[None] * (rank - 1), AXIS),
        carry=PartitionSpec(None, AXIS),
        xs=PartitionSpec(),
        ys=PartitionSpec(None, None, AXIS),
    ),
}


def make_cell(is_gathering: bool, devices: int = 1) -> nn.RNNCellBase:
    """The cell; a gathering one for the part that each of several devices holds."""
    if is_gathering:
        return GatheringCell(WIDTH // devices, AXIS if devices > 1 else None)
    return nn.LSTMCell(WIDTH, param_dtype=jnp.float64)


def plain(cell: nn.RNNCellBase) -> nn.Module:
    return nn.RNN(cell, **_OPTIONS)


def within(cell: nn.RNNCellBase, budget: int | str | None) -> nn.Module:
    return bptt_jax.linen.RNN(cell, **_OPTIONS, budget=budget)


def make_arguments(cell: nn.RNNCellBase) -> Any:
    """Of `vjp`, for the cell of one device."""
    xs = normal(0, LENGTH, BATCH, FEATURES, dtype=jnp.float64)
    variables = plain(cell).init(jax.random.key(1), xs)
    shapes = jax.eval_shape(lambda: cell.initialize_carry(jax.random.key(0), xs.shape[1:]))
    carry = jax.tree.map(lambda leaf: normal(2, *leaf.shape, dtype=jnp.float64), shapes)
    return variables, carry, xs, (carry, normal(3, LENGTH, BATCH, WIDTH, dtype=jnp.float64))


def vjp(layer: nn.Module) -> Callable[..., Any]:
    """(variables, carry, xs, cotangents) -> (results, gradients) of a layer."""

    def run(variables: Any, carry: Any, xs: Any, cotangents: Any) -> Any:
        def apply(variables: Any, carry: Any, xs: Any) -> Any:
            return layer.apply(variables, xs, initial_carry=carry)

        outs, pull = jax.vjp(apply, variables, carry, xs)
        return outs, pull(cotangents)

    return run


def placed(arguments: Any, layout: Layout, mesh: Any) -> Any:
    """The arguments on the devices of a mesh, which may belong to several processes."""

    def place(leaf: Any, spec: PartitionSpec) -> Any:
        return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), lambda index: leaf[index])

    return jax.tree.map(place, jax.device_get(arguments), layout.arguments(arguments))
