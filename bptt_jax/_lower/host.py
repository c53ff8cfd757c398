"""Values kept in the host's memory, where accelerators have a second, larger one.

Transfers name the source too, because JAX puts a cotangent there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax._jaxprs.arrays import zeros_like
from bptt_jax._jaxprs.types import Leaf, Tree


def to_host(leaf: Leaf) -> Any:
    """An array, in the host's memory."""
    return jax.device_put(leaf, jax.memory.Space.Host, src=jax.memory.Space.Device)


def to_device(leaf: Leaf) -> Any:
    """An array, in the device's memory."""
    return jax.device_put(leaf, jax.memory.Space.Device, src=jax.memory.Space.Host)


def blanks_of(make: Callable[[], Tree]) -> Any:
    """Values of the types of a function's results, to be overwritten."""
    likes: list[Callable[[Any], Any]] = []

    def made() -> Tree:
        results = make()
        likes.extend(_blank_for(leaf) for leaf in jax.tree.leaves(results))
        return results

    traced: Any = jax.make_jaxpr(made, return_shape=True)  # a jaxpr, because its types have the axes of a shard_map
    closed, shapes = traced()
    blanks = [like(aval) for like, aval in zip(likes, closed.out_avals, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shapes), blanks)


def _blank_for(leaf: Leaf) -> Callable[[Any], Any]:
    """A function from the type of `leaf` to a value of it; PRNG keys have no zeros."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return zeros_like
    impl = jax.random.key_impl(leaf)
    words = jax.eval_shape(jax.random.key_data, leaf).shape[leaf.ndim :]
    return lambda aval: jax.random.wrap_key_data(jnp.zeros((*aval.shape, *words), jnp.uint32), impl=impl)
