"""The limit of a whole program, in bytes of one device."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax._budget import limit_to_bytes
from bptt_jax._device.free_bytes import room_bytes
from bptt_jax._jaxprs.types import Device, Leaf, Tree


def within_bytes(within: object, args: Sequence[Tree], target: Device) -> int:
    """The bytes of `within`; "auto" is the room of the device, with the arguments on it already.

    Raises:
      TypeError, ValueError: for a malformed limit; if "auto" is asked of a device unable to tell.
    """
    if not (isinstance(within, str) and within == "auto"):
        return limit_to_bytes(within)
    arrays = [leaf for leaf in jax.tree.leaves(tuple(args)) if isinstance(leaf, jax.Array)]
    device = _device_of(arrays) if target is None else target
    return room_bytes(sum(_bytes_on(device, leaf) for leaf in arrays), device)


def _device_of(arrays: Sequence[Leaf]) -> Device:
    """The first device of this process with an argument; else its first."""
    held = {shard.device for leaf in arrays for shard in leaf.addressable_shards}
    return min(held or jax.local_devices(), key=lambda device: device.id)


def _bytes_on(device: Device, leaf: Leaf) -> int:
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    shards = [shard for shard in data.addressable_shards if shard.device == device]
    return sum(int(np.prod(shard.data.shape)) * data.dtype.itemsize for shard in shards)
