"""The profile of a step, corrected by what XLA reports for small programs.

What XLA fuses, copies and finds room for cannot be read off a step. But of a plan's bytes only those of a block are
unknown: carries are kept one by one, at each level of the tree, and add up exactly (tests/test_bytes.py). So loops over
blocks of a few lengths are compiled, for abstract shapes, and the bytes without their carries are those of a block
of this length. They are nearly convex in the length, as a maximum over moments at each of which they grow linearly, and
are interpolated; by what they are above a line in places, the margin is larger. Of a nest only the fixed part is
corrected.

A profile is a pure function of the step's equations, the shapes, the backend and the versions, so the processes of a
job plan alike. It is remembered as long as the process lives.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import time
from typing import Any

import jax

from bptt_jax._cost import cost
from bptt_jax._device.machine import Machine
from bptt_jax._gradient import Gradient
from bptt_jax._lower.jaxprs import uses_16_bits
from bptt_jax._lower.nested import Nested
from bptt_jax._lower.sweep import Sweep
from bptt_jax._lower.swept import Swept
from bptt_jax._measure import measure, told_apart_by
from bptt_jax._plan import Plan, Remat, Repeat, Steps
from bptt_jax._plan import length as length_of
from bptt_jax._step_profile import StepProfile
from bptt_jax._temporaries import Program, temporaries_of_gradient

# Stated in the documentation of `scan`. The loops of a nest copy slices, which is not measured.
MARGIN = {"sweep": 0.02, "nested": 0.05}
ACCELERATOR_MARGIN = 0.05
STATIC_MARGIN = {"sweep": 0.05, "nested": 0.08}
_SPARE_CARRIES = {"sweep": 3, "nested": 1}  # of programs that take the gradients of some arguments only
_SHORTEST = 2  # a loop over one step is none
_OF_NEST = 8
_MANY = 4096
_REMEMBERED = 1024
# Of a TPU's HBM, what programs of any size were seen to take that do not fit on the chip, and what keeps plans shallow:
# in nests of six loops XLA copied xs whole, in smaller ones it did not (v5e).
_TPU_FIXED_BYTES, _TPU_LOOP_BYTES = 2 << 20, 1 << 19
_PARTS, _PARTS_BYTES = 16, 7 << 20  # of a product, at most; and what fills the multiprocessors of an H100
_VERSIONS = tuple(importlib.metadata.version(name) for name in ("jax", "jaxlib"))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A profile, and what it took to measure.

    Attributes:
      profile: of one step, with its margin.
      programs: how many were compiled; 0 where the profile is an estimate from the shapes.
      seconds: how long compiling them took, which is paid once in a process.
    """

    profile: StepProfile
    programs: int = 0
    seconds: float = 0.0


def estimate(gradient: Gradient, form: Swept | None) -> Calibration:
    """The profile from shapes alone, with a margin of 5 % for the sweep and 8 % for the nest."""
    profile = _aligned(measure(gradient, form), gradient)
    return Calibration(dataclasses.replace(profile, margin=STATIC_MARGIN[profile.lowering]))


def calibrated(gradient: Gradient, form: Swept | None) -> Calibration:
    """The profile from at most three compiled programs; the estimate, where they cannot be compiled by themselves.

    Args:
      gradient: the gradient.
      form: the step as the sweep runs it; None for the nest.
    """
    call = gradient.call
    operands, carry, _ = call.step.split(gradient.types)
    key = (
        told_apart_by(call.step),
        call.step.n_operands,
        call.step.n_carry,
        (call.x_along, call.y_along),
        tuple(str(leaf) for leaf in (*operands, *carry, *call.step.x)),
        gradient.wrt,
        gradient.vmaps,
        None if form is None else form.style,
        call.options.machine,
        jax.device_count(),  # where there are several, products may be merged otherwise
        str(jax.sharding.get_abstract_mesh()),
        *_VERSIONS,
    )
    if key not in _known:
        if len(_known) >= _REMEMBERED:
            _known.pop(next(iter(_known)))
        _known[key] = _compiled(gradient, form)
    return _known[key]


_known: dict[Any, Calibration] = {}


def program_of(gradient: Gradient, plan: Plan, form: Swept | None, waits: bool = True) -> Program:
    """The program that runs `plan` for one example.

    Args:
      gradient: the gradient.
      plan: of any length.
      form: the step as the sweep runs it; None for the nest.
      waits: whether sums over devices may wait; see `Sweep`.
    """
    call = dataclasses.replace(gradient.call, length=length_of(plan))
    if form is None:
        return Nested(call, gradient.wrt, plan, gradient.active, bool(gradient.vmaps))
    return Sweep(call, gradient.wrt, plan, form, waits and not gradient.vmaps)


def _compiled(gradient: Gradient, form: Swept | None) -> Calibration:
    profile, machine = measure(gradient, form), gradient.call.options.machine
    start = time.perf_counter()

    def peak_of(n: int) -> int:
        plan = _small_plan(n, machine)
        return temporaries_of_gradient(gradient, program_of(gradient, plan, form), length_of(plan))

    try:
        if machine.platform == "tpu":
            padded, programs = _padded(gradient, form)
            return Calibration(padded, programs, time.perf_counter() - start)
        peaks = {n: peak_of(n) for n in _ends(profile)}
        peaks |= {n: peak_of(n) for n in _turning(profile, peaks)}
    except (NameError, TypeError, ValueError, KeyError, AssertionError, NotImplementedError):
        # What JAX raises for a step that cannot be compiled by itself, outside of the mesh that it is in, and for a
        # backend that reports no memory. `explain` says that the sizes are estimated then.
        return estimate(gradient, form)
    if form is not None:
        corrected = _with_peaks(profile, peaks, machine, uses_16_bits(gradient.call.step.jaxpr.jaxpr))
    else:
        corrected = _with_fixed(profile, peaks, machine)
    return Calibration(_aligned(corrected, gradient), len(peaks), time.perf_counter() - start)


def _aligned(profile: StepProfile, gradient: Gradient) -> StepProfile:
    """With room for arrays, and cotangents, that do not fill a line of memory in all blocks as in those measured."""
    machine, jaxpr = gradient.call.options.machine, gradient.call.step.jaxpr
    line = 64 if machine.is_cpu else 256
    lines = 2 * sum(machine.type_bytes(leaf) % line > 0 for leaf in (*jaxpr.in_avals, *jaxpr.out_avals))
    return dataclasses.replace(profile, fixed_bytes=profile.fixed_bytes + line * lines)


def _loops(machine: Machine) -> tuple[int, ...]:
    """The iterations of loops around a block, enough of them for what it takes to be what it takes in larger programs.

    On a GPU XLA lays out short blocks otherwise, a third larger, in loops of five iterations within loops of five.
    """
    return (2,) if machine.is_cpu else (5, 5)


def _small_plan(n: int, machine: Machine) -> Plan:
    plan: Plan = Steps(n)
    for k in _loops(machine):
        plan = Repeat(k, Remat(plan))
    return plan


def _ends(profile: StepProfile) -> list[int]:
    """Of the blocks to measure: the shortest and the longest; of a nest, one."""
    if profile.lowering == "nested":
        return [_OF_NEST]
    return sorted({_SHORTEST, max(profile.block_steps, _SHORTEST)})


def _turning(profile: StepProfile, peaks: dict[int, int]) -> list[int]:
    """The block to measure between the ends: where a block's residuals begin to outweigh its products.

    That is where the line that ends in the longest block, as steep as the sizes of a step say, meets the one that
    begins with the shortest, as steep as what is left for the products. Where they do not meet in between, a share of
    the products is as good a guess. Bytes of steps without products are on one line, so their ends say all.
    """
    shortest, longest = min(peaks), max(peaks)
    steep = profile.residual_bytes + profile.block_bytes - profile.left_bytes
    if profile.lowering == "nested" or not profile.product_bytes or steep <= 0:
        return []
    above = peaks[shortest] - peaks[longest] + (longest - shortest) * (steep + profile.left_bytes)
    turning = min(round(shortest + above / steep + 0.25), longest // 5)  # late ones were seen where sizes overestimate
    if above <= 0:
        turning = min(round(0.6 * profile.product_bytes / max(profile.residual_bytes, 1)), longest // 3)
    middle = max(turning, shortest + 1)
    return [middle] if middle < longest else []


def _with_peaks(profile: StepProfile, peaks: dict[int, int], machine: Machine, in_16_bits: bool) -> StepProfile:
    highest, ascending = 0, []
    for n, size in sorted(peaks.items()):
        highest = max(highest, size - sum(_loops(machine)) * profile.carry_bytes)
        ascending.append((n, highest))
    spare, margin, loop_bytes = _SPARE_CARRIES["sweep"] * profile.carry_bytes, MARGIN["sweep"], profile.loop_bytes
    if not machine.is_cpu:
        # Whether a product is computed in parts, whose results are added up, depends on its shape by no simple rule.
        in_float32 = profile.product_bytes * (2 if in_16_bits else 1)
        spare, margin = spare + 3 * in_float32 // 2, ACCELERATOR_MARGIN
        loop_bytes *= 3  # fitted to the smallest budgets of steps of a few hundred bytes, for an H100
        if in_16_bits:
            ascending = _with_parts(ascending, in_float32)
    return dataclasses.replace(
        profile, block_peaks=tuple(ascending), fixed_bytes=spare, loop_bytes=loop_bytes, margin=margin
    )


def _with_parts(peaks: list[tuple[int, int]], in_float32: int) -> list[tuple[int, int]]:
    """Peaks with room for products of 16 bits, which are computed in more parts than others, each kept in float32.

    How many parts, depends on the length of a block, and a block may take more than a longer one. That the parts grow
    with the block is all that is relied on: the shortest has none that were not measured.
    """
    shortest, *longer = peaks
    parts = min(_PARTS * in_float32, _PARTS_BYTES + in_float32)
    return [shortest, *((n, peak + parts) for n, peak in longer)]


def _padded(gradient: Gradient, form: Swept | None) -> tuple[StepProfile, int]:
    """The estimate for a TPU, of which each array is as much larger as what is kept there, and the programs compiled.

    Its memory is in tiles, to which small arrays are padded; and it reports none for what fits on the chip. So many
    steps are compiled, to keep what cannot fit there: residuals in one program, carries in another. Of xs and ys that
    are padded, XLA may make copies of another layout, with their gradients, for some plans and not for others.
    """
    profile, machine, step = measure(gradient, form), gradient.call.options.machine, gradient.call.step
    factor = 1
    for plan, kept in ((Steps(_MANY), profile.residual_bytes), (Repeat(_MANY, Remat(Steps(1))), profile.carry_bytes)):
        size = temporaries_of_gradient(gradient, program_of(gradient, plan, form), _MANY)
        factor = max(factor, -(-size // max(_MANY * kept, 1)))
    by_step = (
        "block_bytes",
        "stacked_bytes",
        "advance_bytes",
        "ahead_bytes",
        "moved_bytes",
        "left_bytes",
        "reread_bytes",
        "reread_ct_bytes",
    )
    sizes = ("carry_bytes", "residual_bytes", "x_bytes", "y_bytes", "fixed_bytes", *by_step)
    factor += factor > 1  # what is worked on may be padded more than what is kept
    larger = {name: factor * getattr(profile, name) for name in sizes}
    larger["fixed_bytes"] += _TPU_FIXED_BYTES
    leaves = (*step.x, *step.y)
    copied = 2 * sum(size for leaf in leaves if (size := _tiled_bytes(leaf)) > 2 * machine.type_bytes(leaf))
    larger |= {"copied_bytes": copied, "nest_copied_bytes": 0, "loop_bytes": profile.loop_bytes + _TPU_LOOP_BYTES}
    return dataclasses.replace(profile, margin=ACCELERATOR_MARGIN, **larger), 2


def _tiled_bytes(leaf: Any) -> int:
    """Bytes of a step's array in a TPU's memory: its last axis in lanes of 128, the one before in rows of 8."""
    if leaf.ndim == 0:
        return int(leaf.dtype.itemsize)
    rows, lanes = (1, *leaf.shape)[-2:]
    tiled = 8 * -(-rows // 8) * 128 * -(-lanes // 128)
    return int(math.prod(leaf.shape[:-2]) * tiled * leaf.dtype.itemsize)


def _with_fixed(profile: StepProfile, peaks: dict[int, int], machine: Machine) -> StepProfile:
    ((n, size),) = peaks.items()
    missed = size - cost(_small_plan(n, machine), profile).peak_bytes
    spare = _SPARE_CARRIES["nested"] * profile.carry_bytes
    fixed_bytes = max(profile.fixed_bytes + missed + spare, 0)
    return dataclasses.replace(profile, fixed_bytes=fixed_bytes, margin=MARGIN["nested"])
