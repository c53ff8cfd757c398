"""A whole program for a budget: made by the user's function, traced, compiled, and its bytes read."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bptt_jax._device.machine import machine_for
from bptt_jax._jaxprs.arrays import is_array
from bptt_jax._jaxprs.types import Device, Jaxpr, Leaf, Tree
from bptt_jax._trace.call import Arrays, replace, select
from bptt_jax._whole.scans import Scans, scans_of

_log = logging.getLogger("bptt_jax")


@dataclasses.dataclass(frozen=True)
class ProgramBytes:
    """Bytes of a compiled program on one device, as XLA reports them in `memory_analysis()`.

    Attributes:
      arguments: of the arguments.
      results: of the results, with those in the place of donated arguments.
      aliases: of results in the place of donated arguments, which are counted twice in the two above.
      temporaries: of the rest.
      code: of the machine code, where it is on the device and reported.
      total: of all of these at once: arguments + results - aliases + temporaries + code.
    """

    arguments: int
    results: int
    aliases: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.results - self.aliases + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      budget_bytes: the budget given to `make`.
      bytes: of the program; None where the compiler refused it for its size.
      scan_bytes: temporaries of its differentiated scans, each compiled by itself.
      evaluations: of a step of these scans in one call, first pass included.
      scans: their number.
      keeps_everything: whether these scans run as without a budget.
      platforms: the platforms for which the scans are planned.
      seconds: the time of tracing, of the scans' own checks, and of compiling.
      compiled: the compiled program, to be called with the arguments; None where there is none.
    """

    budget_bytes: int
    bytes: ProgramBytes | None
    scan_bytes: int
    evaluations: float
    scans: int
    keeps_everything: bool
    platforms: frozenset[str]
    seconds: float
    compiled: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def total_bytes(self) -> float:
        """Bytes of the whole program on one device; infinite where the compiler refused it for its size."""
        return math.inf if self.bytes is None else self.bytes.total


@dataclasses.dataclass(frozen=True)
class Traced:
    """A program before it is compiled.

    Attributes:
      budget_bytes: the budget given to `make`.
      scans: its differentiated scans.
      lower: lowers it.
      seconds: the time of tracing, with the scans' own checks.
    """

    budget_bytes: int
    scans: Scans
    lower: Callable[[], Any]
    seconds: float

    def compile(self) -> Program:
        """The program, compiled; its tracing counts in its seconds."""
        start = time.perf_counter()
        with jax.disable_jit(False):
            compiled = _compiled(self.lower())
        seconds = self.seconds + time.perf_counter() - start
        program = Program(
            budget_bytes=self.budget_bytes,
            bytes=None if compiled is None else _bytes_of(compiled),
            scan_bytes=self.scans.temporary_bytes,
            evaluations=self.scans.per_step,
            scans=self.scans.count,
            keeps_everything=self.scans.is_everything,
            platforms=self.scans.platforms,
            seconds=seconds,
            compiled=compiled,
        )
        _log.info("compiled a program of budget %d in %.1f s: %s", self.budget_bytes, seconds, program.total_bytes)
        return program


def traced(make: Callable[[int], Any], budget: int, args: Sequence[Tree]) -> Traced:
    """The program of `make(budget)` for arguments, traced.

    Raises:
      BudgetError: if no plan of a scan is so small.
      TypeError: if `make` returns something else than a jitted function.
      Exception: as `make` and its function raise it.
    """
    start = time.perf_counter()
    function = make(budget)
    if not callable(getattr(function, "lower", None)):
        raise TypeError(
            f"make({budget}) returned {function!r} of type {type(function).__name__}, which has no method `lower`: "
            "return a jitted function, for example jax.jit(step, donate_argnums=0)."
        )
    with jax.disable_jit(False):  # programs are compiled, whatever the mode
        if callable(getattr(function, "trace", None)):
            found = function.trace(*args)
            jaxpr, lower = getattr(found, "traced", found).jaxpr.jaxpr, found.lower  # JAX's own, inside of Flax's
        else:  # as functions of `equinox.filter_jit`
            jaxpr, lower = _jaxpr_of_call(function, args), functools.partial(function.lower, *args)
        scans = scans_of(jaxpr)
    return Traced(budget, scans, lower, time.perf_counter() - start)


def _jaxpr_of_call(function: Callable[..., Any], args: Sequence[Tree]) -> Jaxpr:
    leaves, tree = jax.tree.flatten(tuple(args))
    mask = list(map(is_array, leaves))

    def run(arrays: Arrays) -> Any:
        results = jax.tree.leaves(function(*jax.tree.unflatten(tree, replace(leaves, mask, arrays))))
        return [leaf for leaf in results if is_array(leaf)]

    return jax.make_jaxpr(run)(select(leaves, mask)).jaxpr


def _compiled(lowered: Any) -> Any:
    """The compiled program; None where the compiler refuses it for its size."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise


def _bytes_of(compiled: Any) -> ProgramBytes:
    inner = compiled if hasattr(compiled, "memory_analysis") else compiled.compiled  # JAX's own, inside of Equinox's
    analysis = inner.memory_analysis()
    if analysis is None:
        raise NotImplementedError("the backend does not report the memory of its programs.")
    return ProgramBytes(
        arguments=int(analysis.argument_size_in_bytes),
        results=int(analysis.output_size_in_bytes),
        aliases=int(analysis.alias_size_in_bytes),
        temporaries=int(analysis.temp_size_in_bytes),
        code=int(analysis.generated_code_size_in_bytes),
    )


def placed(args: Sequence[Tree], target: Device) -> list[Tree]:
    """The arguments as shapes on a target device; as they are without one.

    A shape with a sharding keeps it. Arrays are on a device of this machine, so their own shardings are left out.
    """
    if target is None:
        return list(args)
    there = jax.sharding.SingleDeviceSharding(target)

    def place(leaf: Leaf) -> Any:
        if not is_array(leaf) or (isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None):
            return leaf
        weak = bool(getattr(leaf, "weak_type", False))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there, weak_type=weak)

    return [jax.tree.map(place, arg) for arg in args]


def argument_bytes(args: Sequence[Tree], target: Device) -> int:
    """Bytes of the arguments on one device, as far as their shardings are known: an estimate."""
    machine, count = machine_for(target), 0
    for leaf in filter(is_array, jax.tree.leaves(tuple(args))):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        count += machine.type_bytes(jax.ShapeDtypeStruct(shape, leaf.dtype))
    return count
