"""Taps: equations of the loop that multiply with a constant, or add one, so its gradient can be deferred.

The result of a tapped equation gets an additive zero, whose cotangent is the cotangent of the result. The constant,
called the weight, is held fixed while a step is differentiated. It is closed over for this, because higher derivatives
then still see it; `stop_gradient` would drop its tangent. One product of a block's stacked cotangents with the stacked
other operands gives the weight's gradient.
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

from bptt_jax._figures import LARGE_BYTES
from bptt_jax._jaxprs.arrays import explicit_sharding, zeros_like
from bptt_jax._jaxprs.equations import apply
from bptt_jax._jaxprs.types import Eqn, Index, Leaf, Tree
from bptt_jax._step.rows import product
from bptt_jax._trace.call import Arrays

SUMS = {primitives.add_p, primitives.sub_p}


@dataclasses.dataclass(frozen=True, eq=False)
class Tap:
    """An equation of the loop that is linear in a constant, the weight.

    Attributes:
      eqn: a product, or a sum.
      side: the index of the weight among its two operands.
      const: the position of the weight among the constants.
    """

    eqn: Any
    side: int
    const: int

    @property
    def left(self) -> Any:
        """The variable multiplied with the weight; None for a sum."""
        return None if self.eqn.primitive in SUMS else self.eqn.invars[1 - self.side]

    def gradient(self, weight: Leaf, left: Leaf, cotangents: Tree) -> Any:
        """The weight's gradient over a block of n steps.

        Args:
          weight: the weight; only its type is read.
          left: (n, ...), the value of `self.left` at each step.
          cotangents: (n, ...), of the equation's result.
        """
        if left is None:
            return self._sum(weight, -cotangents if self._is_negative else cotangents)

        products = functools.partial(product, self.eqn, self.side, left)
        (gradient,) = jax.linear_transpose(products, weight)(cotangents)
        return gradient

    @property
    def _is_negative(self) -> bool:
        return self.eqn.primitive is primitives.sub_p and self.side == 1

    def _sum(self, weight: Leaf, cotangents: Tree) -> Any:
        """The sum over the block, and over the axes along which the weight is broadcast."""
        if weight.ndim == 0:  # JAX adds a scalar to an array without broadcasting it first
            return jnp.sum(cotangents)
        broadcast = [i for i, size in enumerate(weight.shape) if size == 1]
        waiting = jax.typeof(weight).sharding.spec.reduced
        if not waiting:
            total = jnp.sum(jnp.sum(cotangents, 0), broadcast, keepdims=True)
            wanted = explicit_sharding(weight)
            # A weight held whole by all devices may be added to an array whose axis they divide.
            return total if wanted is None else jax.reshard(total, wanted)
        # The sum is a product with ones, because only a product can leave its result unreduced.
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
    """`add(total, left, cotangents)` over a block of n steps, by a loop over its two halves.

    XLA runs one loop after another, and the arrays of a loop exist only while it runs. Time is divided, because this
    axis is never sharded. For odd n, one step is in both halves and counts in the first. A single step also takes two
    iterations, because XLA would inline a loop of one.
    """
    n = cotangents.shape[0]
    half = (n + 1) // 2

    def body(total: Leaf, i: Index) -> Any:
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=i * (n - half), slice_size=half)
        is_new = (jnp.arange(half) > 0) | (i == 0)

        def once(array: Leaf) -> Any:
            # Both factors are zero for a step counted before, because zero times infinity is NaN.
            array = part(array)
            new = lax.expand_dims(is_new, range(1, array.ndim))
            return jnp.where(new, array, zeros_like(array)) if n % 2 else array

        if n == 1:  # there is no second half, and masks would copy the operand
            return lax.cond(i == 0, lambda: add(total, left, cotangents), lambda: total), None
        return add(total, once(left), once(cotangents)), None

    total, _ = lax.scan(body, total, jnp.arange(2, dtype=jnp.int32))
    return total


def is_large(weight: Leaf) -> bool:
    """Whether a weight's gradient is worth a loop of its own."""
    return bool(weight.size * weight.dtype.itemsize >= LARGE_BYTES)


@dataclasses.dataclass
class Taps:
    """The evaluation of tapped equations in `SplitStep.loop`.

    Attributes:
      weights: for each tap the weight for its equation to use.
      zeros: for each tap the term added to its result.
      lefts: filled in the order of evaluation, equal to the order of the taps.
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
