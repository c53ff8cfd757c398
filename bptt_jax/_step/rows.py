"""Equations evaluated for all steps of a block at once.

A product of a block's values with a weight is one matrix product: steps and batch become the rows of one matrix.
Under `jax.vmap` they would stay two axes, and on CPU XLA copies the cotangents, transposed, for the product over both
axes that is the weight's gradient (`python -m pytest tests/lower -k copy_of_cotangents`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives

from bptt_jax._jaxprs.arrays import may_be_divided
from bptt_jax._jaxprs.equations import Env, apply, evaluate, is_in, reachable
from bptt_jax._jaxprs.types import Eqn, Leaf


def evaluate_for_block(eqns: Sequence[Any], env: Env, xs: Sequence[Any]) -> None:
    """Runs equations for all steps of a block, writing their results into `env`.

    Args:
      eqns: equations of one step.
      env: values; those of `xs`, and of all variables made of these, have the steps as their first axis.
      xs: variables of one step's inputs.
    """
    stacked = reachable(eqns, xs)

    def apply_to_block(eqn: Eqn, values: Sequence[Any]) -> Sequence[Any]:
        axes = tuple(0 if is_in(v, stacked) else None for v in eqn.invars)
        if axes in ((0, None), (None, 0)) and eqn.primitive is primitives.dot_general_p:
            side = axes.index(None)
            return [product(eqn, side, values[1 - side], values[side])]
        if 0 not in axes:
            return apply(eqn, values)
        return jax.vmap(lambda *values: tuple(apply(eqn, values)), in_axes=axes)(*values)

    evaluate(eqns, env, apply_to_block)


def product(eqn: Eqn, side: int, left: Leaf, weight: Leaf) -> Any:
    """The results of a product for all steps of a block, steps first.

    Args:
      eqn: the product of one step.
      side: the index of the weight among its two operands.
      left: the other operand, of all steps.
      weight: the weight.
    """
    if not _has_rows(eqn, side):
        return jax.vmap(lambda left: apply(eqn, [weight, left] if side == 0 else [left, weight])[0])(left)
    (over_left, over_weight), _ = eqn.params["dimension_numbers"]
    rows, shared = left.shape[: left.ndim - len(over_left)], left.shape[left.ndim - len(over_left) :]
    first = left.ndim - 1 - len(over_left)  # of the contracted axes, in one step
    params = dict(eqn.params)
    params["dimension_numbers"] = ((tuple(i - first + 1 for i in over_left), over_weight), ((), ()))
    with eqn.ctx.manager:
        result = lax.dot_general(lax.reshape(left, (math.prod(rows), *shared)), weight, **params)
    return lax.reshape(result, (*rows, *result.shape[1:]))


def _has_rows(eqn: Eqn, side: int) -> bool:
    """Whether a product is of rows with a weight: in memory the rows' axes come first, and no mesh divides them."""
    if eqn.primitive is not primitives.dot_general_p or side == 0 or eqn.params.get("out_sharding") is not None:
        return False
    (over_left, _), (batch, _) = eqn.params["dimension_numbers"]
    first = eqn.invars[0].aval.ndim - len(over_left)
    is_last = not batch and sorted(over_left) == list(range(first, first + len(over_left)))
    return is_last and not any(may_be_divided(eqn.invars[0], axis) for axis in range(first))
