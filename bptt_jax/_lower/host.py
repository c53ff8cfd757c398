"""Values kept in the host's memory, where accelerators have a second, larger one.

Transfers name the source too, because JAX puts a cotangent there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from bptt_jax._jaxprs.arrays import vary, varying_axes
from bptt_jax._jaxprs.types import Leaf, Tree
from bptt_jax.plans._nodes import Memory


def to_host(leaf: Leaf) -> Any:
    """An array, in the host's memory."""
    return jax.device_put(leaf, jax.memory.Space.Host, src=jax.memory.Space.Device)


def to_device(leaf: Leaf) -> Any:
    """An array, in the device's memory."""
    return jax.device_put(leaf, jax.memory.Space.Device, src=jax.memory.Space.Host)


def scan_keeping(memory: Memory, body: Callable[[Any, Any], Any], init: Tree, xs: Tree) -> tuple[Any, Any]:
    """`jax.lax.scan` of a body (carry, x) -> (carry, kept values), with the stack of these in a memory.

    On the host, a step's values are moved while the next step runs, and those of the last stay on the device: the
    result is (carry, [stack, values of the last]), and the first place of the stack has no meaning.
    """
    if memory == "device":
        return lax.scan(body, init, xs)

    def behind(state: Tree, x: Tree) -> Any:
        carry, before = state
        carry, kept = body(carry, x)
        return (carry, kept), jax.tree.map(to_host, before)

    blank = _blanks_of(lambda: body(init, jax.tree.map(lambda leaf: leaf[0], xs))[1])
    (carry, last), stack = lax.scan(behind, (init, blank), xs)
    return carry, [stack, last]


def scan_back(memory: Memory, body: Callable[[Any, Any, Any], Any], init: Tree, xs: Tree, kept: Tree) -> Any:
    """The last carry of a reversed scan of a body (carry, x, kept values) -> carry, as `scan_keeping` kept them.

    From the host, the values for a step are read while the step before runs.
    """
    if memory == "device":
        return lax.scan(lambda carry, at: (body(carry, *at), None), init, (xs, kept), reverse=True)[0]

    def ahead(state: Tree, at: Tree) -> Any:
        (carry, values), (x, before) = state, at
        return (body(carry, x, values), jax.tree.map(to_device, before)), None

    stack, last = kept
    return lax.scan(ahead, (init, last), (xs, stack), reverse=True)[0][0]


def _blanks_of(make: Callable[[], Tree]) -> Any:
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
        return lambda aval: ad.instantiate_zeros(ad.Zero(aval))  # it knows the axes of a shard_map
    impl = jax.random.key_impl(leaf)
    words = jax.eval_shape(jax.random.key_data, leaf).shape[leaf.ndim :]

    def blank(aval: Any) -> Any:
        keys = jax.random.wrap_key_data(jnp.zeros((*aval.shape, *words), jnp.uint32), impl=impl)
        return vary(keys, varying_axes(aval))

    return blank
