"""The temporary bytes that XLA reports for a program that is compiled by itself, for abstract arguments."""

from __future__ import annotations

import concurrent.futures
import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from bptt_jax._lower.jaxprs import explicit_sharding, vary, varying_axes
from bptt_jax._lower.nested import Run
from bptt_jax._lower.roofline import platform
from bptt_jax._step import TracedScan

Vjp = Callable[[Any, Any], Any]  # (arguments, cotangents) -> (results, gradients)


def temporaries_of_vjp(program: Run, traced: TracedScan, length: int, target: Any = None) -> int:
    """Temporary bytes on a device of the jitted vjp of a program over (operands, carry, xs).

    Args:
      program: the program.
      traced: a call, for the types of its arguments; tracers will do, also those of a `jax.shard_map`.
      length: the number of steps of the program.
      target: the device to compile for; None for the default backend.

    Raises:
      NotImplementedError: if the backend does not report it.
    """
    shape = functools.partial(_shape, target=target)
    xs = [shape(leaf, (length, *leaf.shape[1:])) for leaf in traced.xs]
    operands, carry = ([shape(leaf, leaf.shape) for leaf in group] for group in (traced.operands, traced.carry))
    arguments = (operands, carry, xs)
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Manual not in mesh.axis_types:
        compiled = _compiled(program, arguments, shape)
    else:
        axes = [varying_axes(leaf) for group in (traced.operands, traced.carry, traced.xs) for leaf in group]
        compiled = _elsewhere(functools.partial(_compiled_in_mesh, program, arguments, axes, mesh))
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError(f"the backend {platform()} does not report the memory of its programs.")
    return int(analysis.temp_size_in_bytes)


def _vjp_of(program: Run) -> Vjp:
    def vjp(arguments: Any, cotangents: Any) -> Any:
        out, pull = jax.vjp(program, *arguments)
        cotangents = [_vary(ct, varying_axes(leaf)) for ct, leaf in zip(cotangents, jax.tree.leaves(out), strict=True)]
        return out, pull(jax.tree.unflatten(jax.tree.structure(out), cotangents))

    return vjp


def _compiled(program: Run, arguments: Any, shape: Callable[..., Any]) -> Any:
    results = jax.tree.leaves(jax.eval_shape(program, *arguments))
    cotangents = [shape(out, out.shape, is_cotangent=True) for out in results]
    return jax.jit(_vjp_of(program)).lower(arguments, cotangents).compile()


def _elsewhere(compile_there: Callable[[], Any]) -> Any:
    """Calls a function where nothing is being traced: while a `jax.shard_map` is, nothing can be compiled."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, compile_there).result()


def _compiled_in_mesh(program: Run, arguments: Any, axes: list[frozenset[Any]], mesh: Any) -> Any:
    """The vjp inside a `jax.shard_map` of its own, over a mesh of the same axes.

    What a device holds is passed as a whole, and then made to vary over the axes that it varied over.
    """
    devices = jax.make_mesh(mesh.axis_sizes, mesh.axis_names, (AxisType.Auto,) * len(mesh.axis_names))
    whole, check = PartitionSpec(), any(axes)
    in_mesh = functools.partial(jax.shard_map, mesh=devices, in_specs=whole, check_vma=check)

    def varying(arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        return jax.tree.unflatten(tree, [_vary(leaf, names) for leaf, names in zip(leaves, axes, strict=True)])

    def one_of_each(leaves: Any) -> list[Any]:
        """With an axis over the devices: what varies cannot leave otherwise."""
        return [_vary(leaf, frozenset(mesh.axis_names))[None] for leaf in jax.tree.leaves(leaves)]

    split = PartitionSpec(mesh.axis_names) if check else whole
    results = jax.eval_shape(
        in_mesh(lambda arguments: one_of_each(program(*varying(arguments))), out_specs=split), arguments
    )
    cotangents = [_shape(out, out.shape[1:], is_cotangent=True) for out in results]

    def vjp(arguments: Any, cotangents: Any) -> Any:
        return one_of_each(_vjp_of(program)(varying(arguments), cotangents))

    return jax.jit(in_mesh(vjp, out_specs=split)).lower(arguments, cotangents).compile()


def _vary(leaf: Any, names: frozenset[Any]) -> Any:
    if leaf.dtype == jax.dtypes.float0:  # no array, so it has no axes
        return leaf
    return vary(leaf, names)


def _shape(leaf: Any, shape: tuple[int, ...], target: Any = None, is_cotangent: bool = False) -> jax.ShapeDtypeStruct:
    """An argument to compile for.

    It has a sharding only where that is part of the type: others, copied out of a trace, are refused by some meshes.
    """
    has_cotangent = jnp.issubdtype(leaf.dtype, jnp.inexact)
    dtype = jax.dtypes.float0 if is_cotangent and not has_cotangent else leaf.dtype
    if target is not None:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(target))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=explicit_sharding(leaf))
