"""Properties of arrays, tracers and their types: differentiable or not, their sharding, and zeros of the same type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bptt_jax._jaxprs.types import Atom, Leaf

_SOME_SIZE = 16  # any number: decisions by it are for speed only


def zeros_like(leaf: Leaf) -> Any:
    """Zeros of the type of `leaf`, in a `shard_map` varying over the same axes of its mesh."""
    return vary(jax.numpy.zeros_like(leaf), varying_axes(leaf))


def vary(leaf: Leaf, axes: frozenset[Any]) -> Any:
    """`leaf`, in a `shard_map` made to vary over these axes of its mesh as well."""
    missing = axes - varying_axes(leaf)
    # Sorted, because sets have another order in each process, and the programs of all must be the same.
    return jax.lax.pcast(leaf, tuple(sorted(missing, key=str)), to="varying") if missing else leaf


def varying_axes(leaf: Leaf) -> frozenset[Any]:
    """The axes of a mesh over which the values of an array, or of a type, differ in a `shard_map`."""
    return _varying(leaf if isinstance(leaf, jax.core.ShapedArray) else jax.typeof(leaf))


def _varying(aval: Any) -> frozenset[Any]:
    by_name = getattr(aval, "vma", None)  # the attribute's name depends on the version of JAX
    return frozenset(by_name if by_name is not None else aval.manual_axis_type.varying)


def counted(shape: Sequence[Any]) -> tuple[int, ...]:
    """A shape for decisions by size, where an unknown size (as in `jax.export` for any batch) counts as some number.

    >>> from jax import export
    >>> counted((3, *export.symbolic_shape("batch")))
    (3, 16)
    """
    return tuple(_SOME_SIZE if is_unknown(size) else int(size) for size in shape)


def is_unknown(size: Any) -> bool:
    """Whether a size is a symbol, or made of symbols."""
    return not isinstance(size, int | np.integer)


def is_float(atom: Atom) -> bool:
    """Whether a variable, literal, array or tracer is differentiable."""
    dtype = atom.aval.dtype if hasattr(atom, "aval") else atom.dtype
    return bool(jax.numpy.issubdtype(dtype, jax.numpy.inexact))


def is_array(leaf: Leaf) -> bool:
    """Whether a leaf of arguments is an array or stands for one, so it can be traced."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def explicit_sharding(leaf: Leaf) -> jax.sharding.NamedSharding | None:
    """The sharding in the type of a leaf, under a mesh with explicit axes; None without such a mesh."""
    sharding = getattr(jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return sharding if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types else None


def may_be_divided(atom: Atom, axis: int) -> bool:
    """Whether an axis of a variable's values may be divided among devices.

    Types show explicit sharding, but no automatic sharding.
    """
    sharding = explicit_sharding(atom.aval)
    if sharding is not None:
        return sharding.spec.partitions[axis : axis + 1] not in ((), (None,))
    kinds = jax.sharding.get_abstract_mesh().axis_types
    is_part = bool(kinds) and all(kind == jax.sharding.AxisType.Manual for kind in kinds)  # in a shard_map
    return not is_part and jax.device_count() > 1
