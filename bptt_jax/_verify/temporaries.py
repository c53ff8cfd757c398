"""XLA's temporary bytes for a program compiled by itself, for abstract arguments."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bptt_jax._jaxprs.arrays import explicit_sharding, vary, varying_axes
from bptt_jax._jaxprs.types import Device, Leaf, Tree
from bptt_jax._lower.program import Program
from bptt_jax._trace.call import select
from bptt_jax._trace.gradient import Gradient, mapped

Run = Callable[..., Any]  # (*inputs, *cotangents) -> (results, gradients)
# XLA assigns buffers before it makes machine code. Code without optimisation takes half of the time to make, and is
# never run (tests/verify/test_check.py).
_ASSIGN_ONLY = {"xla_backend_optimization_level": 0}


def temporaries_of_gradient(gradient: Gradient, program: Program) -> tuple[int, int]:
    """Temporary bytes on one device, and on its host, of the jitted gradient of a scan.

    The gradient is for cotangents of all active results.

    Args:
      gradient: gives the types of the arguments, also of tracers, and inside a `jax.shard_map`.
      program: the program to run the scan.

    Raises:
      NotImplementedError: if the backend does not report memory.
    """
    context, explicit = jax.sharding.get_abstract_mesh(), mesh_of_types(gradient)
    machine = gradient.call.options.machine
    options: Any = _ASSIGN_ONLY if machine.is_cpu else None
    if AxisType.Manual in context.axis_types:
        compiled = _elsewhere(lambda: _lowered_in_mesh(gradient, program, context).compile(options))
    elif explicit is not None and context.empty:  # a mesh named by the arrays alone has to be set for compiling
        compiled = _elsewhere(lambda: _lowered(gradient, program).compile(options), _devices_of(explicit))
    else:
        compiled = _lowered(gradient, program).compile(options)
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError(f"the backend {machine.platform} does not report the memory of its programs.")
    return int(analysis.temp_size_in_bytes), int(analysis.host_temp_size_in_bytes)


def mesh_of_types(gradient: Gradient) -> Any:
    """The mesh with explicit axes named by the types of the arguments; None without one."""
    shardings = map(explicit_sharding, gradient.types)
    return next((sharding.mesh for sharding in shardings if sharding is not None), None)


def _devices_of(mesh: Any, axis_types: Any = None) -> jax.sharding.Mesh:
    """A mesh of devices with the sizes and names of another mesh's axes."""
    return jax.make_mesh(mesh.axis_sizes, mesh.axis_names, axis_types or mesh.axis_types)


def _results_of(gradient: Gradient, program: Program) -> Run:
    """A function from inputs to the results with cotangents, for all examples."""
    mask = (*gradient.active.carry, *gradient.active.y)
    return mapped(gradient.vmaps, lambda *inputs: select(program.forward(inputs)[0], mask))


def _gradient_of(gradient: Gradient, program: Program) -> Run:
    """A function from inputs and cotangents to results and gradients, for all examples."""
    n, mask = len(gradient.wrt), (*gradient.active.carry, *gradient.active.y)

    def run(*args: Any) -> Any:
        inputs, cotangents = args[:n], args[n:]
        outs, saved = program.forward(inputs)
        given = [vary(ct, varying_axes(out)) for ct, out in zip(cotangents, select(outs, mask), strict=True)]
        return outs, [ct for ct in program.backward(inputs, saved, given) if ct is not None]

    # The examples are the first axis of results, so also of their cotangents.
    with_cotangents = [dataclasses.replace(v, dims=(*v.dims, *[0] * sum(mask))) for v in gradient.vmaps]
    return mapped(with_cotangents, run)


def _lowered(gradient: Gradient, program: Program) -> Any:
    inputs, target = _inputs(gradient), gradient.call.options.machine.device
    results = jax.eval_shape(_results_of(gradient, program), *inputs)
    cotangents = [_shape(out, out.shape, explicit_sharding(out), target) for out in results]
    return jax.jit(_gradient_of(gradient, program)).lower(*inputs, *cotangents)


def _elsewhere(compile_there: Callable[[], Any], mesh: jax.sharding.Mesh | None = None) -> Any:
    """Calls a function in a thread of its own, because nothing can be compiled while a `jax.shard_map` is traced.

    A thread begins with the process's JAX settings, so the settings of context managers are handed on.
    """
    in_double = bool(cast(Any, jax.config).jax_enable_x64)

    def call() -> Any:
        with jax.enable_x64(in_double), contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return compile_there()

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, call).result()


def _lowered_in_mesh(gradient: Gradient, program: Program, mesh: Any) -> Any:
    """The gradient, lowered inside a `jax.shard_map` of its own, over a mesh with the same axes.

    The shard of a device is passed as a whole array, then made to vary over the axes it varied over.
    """
    axes = list(map(varying_axes, gradient.types))
    devices = _devices_of(mesh, (AxisType.Auto,) * len(mesh.axis_names))
    whole, check = PartitionSpec(), any(axes)
    in_mesh = functools.partial(jax.shard_map, mesh=devices, in_specs=whole, check_vma=check)

    def varying(inputs: Sequence[Any]) -> list[Any]:
        return [vary(leaf, names) for leaf, names in zip(inputs, axes, strict=True)]

    def one_of_each(leaves: Tree) -> list[Any]:
        """Leaves with a new axis over the devices, because values varying over them cannot leave otherwise."""
        return [vary(leaf, frozenset(mesh.axis_names))[None] for leaf in jax.tree.leaves(leaves)]

    split = PartitionSpec(mesh.axis_names) if check else whole
    inputs, results_of = _inputs(gradient), _results_of(gradient, program)
    results = jax.eval_shape(
        in_mesh(lambda *inputs: one_of_each(results_of(*varying(inputs))), out_specs=split), *inputs
    )
    cotangents = [_shape(out, out.shape[1:]) for out in results]
    run = _gradient_of(gradient, program)

    def all_of_it(*args: Any) -> list[Any]:
        return one_of_each(run(*varying(args[: len(axes)]), *args[len(axes) :]))

    return jax.jit(in_mesh(all_of_it, out_specs=split)).lower(*inputs, *cotangents)


def _inputs(gradient: Gradient) -> list[Any]:
    """The types of the inputs of all examples."""
    found = []
    for i, leaf in enumerate(gradient.types):
        shape, sharding = leaf.shape, explicit_sharding(leaf)
        for vmap in gradient.vmaps:
            if (dim := vmap.dims[i]) is not None:
                shape = (*shape[:dim], vmap.size, *shape[dim:])
                if sharding is not None:
                    spec = list(sharding.spec)
                    sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec[:dim], None, *spec[dim:]))
        found.append(_shape(leaf, shape, sharding, gradient.call.options.machine.device))
    return found


def _shape(leaf: Leaf, shape: tuple[int, ...], sharding: Any = None, target: Device = None) -> jax.ShapeDtypeStruct:
    """An abstract argument to compile for.

    It has a sharding only for a target device, or where the sharding is part of the type, because some meshes refuse
    others, copied out of a trace.
    """
    if target is not None:
        sharding = jax.sharding.SingleDeviceSharding(target)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
