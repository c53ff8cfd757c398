"""Taps: where the loop multiplies with a constant, or adds one, so that the constant's gradient can be deferred.

The result of a tapped equation gets an additive zero, whose cotangent is that of the result. The constant, the weight,
is held fixed while a step is differentiated: closed over, for higher derivatives see it then (stop_gradient would drop
its tangent). A block's cotangents, stacked, give the weight's gradient by one product.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives
from jax.sharding import NamedSharding, PartitionSpec

from bptt_jax._jaxprs.arrays import zeros_like
from bptt_jax._jaxprs.equations import apply
from bptt_jax._jaxprs.types import Eqn, Index, Leaf, Tree
from bptt_jax._trace.call import Arrays

_LARGE_BYTES = 1 << 15
SUMS = {primitives.add_p, primitives.sub_p}


@dataclasses.dataclass(frozen=True, eq=False)
class Tap:
    """An equation of the loop that is linear in a constant, the weight.

    Attributes:
      eqn: a product, or a sum.
      side: which of its two operands is the weight.
      const: the position of the weight among the constants.
    """

    eqn: Any
    side: int
    const: int

    @property
    def left(self) -> Any:
        """The variable that the weight is multiplied with; None for a sum."""
        return None if self.eqn.primitive in SUMS else self.eqn.invars[1 - self.side]

    def gradient(self, weight: Leaf, left: Leaf, cotangents: Tree) -> Any:
        """The weight's gradient over a block of n steps.

        Args:
          weight: for its type.
          left: (n, ...), `self.left` at each step.
          cotangents: (n, ...), of the equation's result.
        """
        if left is None:
            return self._sum(weight, -cotangents if self._is_negative else cotangents)

        def product(left: Leaf, weight: Leaf) -> Any:
            return apply(self.eqn, [weight, left] if self.side == 0 else [left, weight])[0]

        products = functools.partial(jax.vmap(product, (0, None)), left)
        (gradient,) = jax.linear_transpose(products, weight)(cotangents)
        return gradient

    @property
    def _is_negative(self) -> bool:
        return self.eqn.primitive is primitives.sub_p and self.side == 1

    def _sum(self, weight: Leaf, cotangents: Tree) -> Any:
        """Over the block, and where the weight is broadcast."""
        if weight.ndim == 0:  # JAX adds a scalar to an array without broadcasting it first
            return jnp.sum(cotangents)
        broadcast = [i for i, size in enumerate(weight.shape) if size == 1]
        waiting = jax.typeof(weight).sharding.spec.reduced
        if not waiting:
            return jnp.sum(jnp.sum(cotangents, 0), broadcast, keepdims=True)
        # Only a product has a result that is left unreduced.
        sharding, over = jax.typeof(cotangents).sharding, [0, *(i + 1 for i in broadcast)]
        ones = jnp.ones([cotangents.shape[i] for i in over], cotangents.dtype)
        ones = jax.reshard(ones, NamedSharding(sharding.mesh, PartitionSpec(*(sharding.spec[i] for i in over))))
        left = [axis for i, axis in enumerate(sharding.spec) if i not in over]
        total = lax.dot_general(
            ones,
            cotangents,
            ((range(len(over)), over), ((), ())),
            precision=lax.Precision.HIGHEST,
            out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*left, unreduced=waiting)),
        )
        return lax.expand_dims(total, broadcast)


def by_halves(add: Callable[[Any, Any, Any], Any], total: Leaf, left: Leaf, cotangents: Tree) -> Any:
    """`add(total, left, cotangents)` over a block of n steps, by a loop over its halves.

    XLA runs one loop after another, and what a loop works on exists only while it runs. The halves are those of the
    time, an axis that is never sharded. Where n is odd, one step is in both and counts in the first; that goes for a
    single step too, since XLA would inline a loop of one iteration.
    """
    n = cotangents.shape[0]
    half = (n + 1) // 2

    def body(total: Leaf, i: Index) -> Any:
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=i * (n - half), slice_size=half)
        cts = part(cotangents)
        if n % 2:
            is_new = lax.expand_dims((jnp.arange(half) > 0) | (i == 0), range(1, cts.ndim))
            cts = jnp.where(is_new, cts, zeros_like(cts))
        return add(total, part(left), cts), None

    total, _ = lax.scan(body, total, jnp.arange(2, dtype=jnp.int32))
    return total


def is_large(weight: Leaf) -> bool:
    """Whether a weight's gradient is worth a loop of its own."""
    return bool(weight.size * weight.dtype.itemsize >= _LARGE_BYTES)


@dataclasses.dataclass
class Taps:
    """How `SplitStep.loop` evaluates the tapped equations.

    Attributes:
      weights: for each tap the weight that its equation is to use.
      zeros: for each tap what is added to its result.
      lefts: filled in the order of evaluation, which is that of the taps.
    """

    taps: Sequence[Tap]
    weights: Arrays
    zeros: Arrays
    lefts: list[Any] = dataclasses.field(default_factory=list)

    def apply(self, eqn: Eqn, values: Sequence[Any]) -> Sequence[Any]:
        index = next((i for i, tap in enumerate(self.taps) if tap.eqn is eqn), None)
        if index is None:
            return apply(eqn, values)
        tap = self.taps[index]
        used = list(values)
        used[tap.side] = self.weights[index]
        (result,) = apply(eqn, used)
        self.lefts.append(None if tap.left is None else values[1 - tap.side])
        return [result + self.zeros[index]]
