"""Sizes and relative times of one step: the numbers by which planners compare plans."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from bptt_jax.errors import as_count

Lowering = Literal["nested", "sweep"]


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Times of the parts of a scan, relative to each other; planners compare plans by them.

    >>> StepTimes(backward=2.5).of_everything_kept(1000)
    3500.0

    Attributes:
      forward: one step evaluated without keeping anything.
      recording: one step evaluated with its residuals kept.
      backward: the backward of one step.
      block: the cost of a block of steps beside its steps, each time the block is evaluated. It makes planners prefer
        long blocks.
      transfer: moving a byte between the device and the host, beside other work.
    """

    forward: float = 1.0
    recording: float = 1.0
    backward: float = 2.0
    block: float = 0.0
    transfer: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"StepTimes.{field.name} must be a number, got {value!r}.")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"StepTimes.{field.name} must be finite and not negative, got {value}.")
            object.__setattr__(self, field.name, float(value))

    def of_everything_kept(self, length: int) -> float:
        """The time of a gradient with the residuals of all steps kept."""
        return length * (self.recording + self.backward) + (self.block if length else 0.0)


@dataclasses.dataclass(frozen=True)
class SweepProfile:
    """Sizes of one step in bytes, as the sweep runs it: in blocks, with matrix products taken out of their loops.

    Attributes:
      carry_bytes: one carry, without the leaves passed on unchanged by every step.
      residual_bytes: the residuals of one step, kept by a block for the step's backward.
      block_bytes: further bytes of a block for each of its steps, beside the residuals, while the block is worked on.
      operand_bytes: the part of residual_bytes held until the block's end, for the products over all of its steps.
      product_bytes: the results of these products, before they are added to the gradients.
      block_steps: the length of the longest block; longer `Steps` are run as several blocks.
      together: steps that are wanted in each iteration of a block's loop. More than one is for devices where each
        iteration launches kernels, so plans have blocks that can be divided so.
      copied_bytes: copies of xs and ys, for each step of the scan, held throughout under any plan.
      fixed_bytes: bytes of a backward pass of any length under any plan.
      times: relative times.
    """

    carry_bytes: int
    residual_bytes: int
    block_bytes: int = 0
    operand_bytes: int = 0
    product_bytes: int = 0
    block_steps: int = 1
    together: int = 1
    copied_bytes: int = 0
    fixed_bytes: int = 0
    times: StepTimes = StepTimes()

    def __post_init__(self) -> None:
        _check_counts(self, at_least_1=("block_steps", "together"))


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Sizes of one step of `jax.lax.scan`, in bytes, and the relative times of its parts.

    `bptt_jax.profile` makes one from shapes; one made by hand is just as good:

    >>> profile = StepProfile(carry_bytes=32_768, residual_bytes=196_608, x_bytes=16_384, y_bytes=16_384)
    >>> profile.store_all_bytes(1000)
    196608000

    Attributes:
      carry_bytes: one carry, without the leaves passed on unchanged by every step.
      residual_bytes: the residuals of one step, kept by a loop of steps for the step's backward.
      x_bytes: one step's slice of `xs`.
      y_bytes: one step's output `y`.
      param_bytes: the differentiated closed-over floating arrays, each with a gradient of its own.
      fixed_bytes: bytes of a backward pass of any length under any plan.
      times: relative times, for planners only: bytes and counts of evaluations do not depend on them.
      copied_bytes: copies of xs and ys, for each step of the scan, held throughout under any plan.
      unit_axis_bytes: further copies for each step, of arrays with axes of length 1, under any plan but `Steps` and a
        loop over single steps.
      sweep: the sizes where plans run as sweeps; None where they run as nests of `jax.checkpoint` around
        `jax.lax.scan`.
    """

    carry_bytes: int
    residual_bytes: int
    x_bytes: int = 0
    y_bytes: int = 0
    param_bytes: int = 0
    fixed_bytes: int = 0
    times: StepTimes = StepTimes()
    copied_bytes: int = 0
    unit_axis_bytes: int = 0
    sweep: SweepProfile | None = None

    def __post_init__(self) -> None:
        if not (self.sweep is None or isinstance(self.sweep, SweepProfile)):
            raise TypeError(f"StepProfile.sweep must be a SweepProfile or None, got {self.sweep!r}.")
        _check_counts(self)

    @property
    def lowering(self) -> Lowering:
        """How a plan for this step is run: "nested" or "sweep"."""
        return "nested" if self.sweep is None else "sweep"

    def store_all_bytes(self, length: int) -> int:
        """Temporary bytes of `jax.lax.scan` for the profile's gradient, with the residuals of every step kept.

        Without `sweep` it equals `cost(Steps(length), self).peak_bytes`, because this plan is `jax.lax.scan`.
        """
        return length * (self.residual_bytes + self.copied_bytes) + self.param_bytes + self.fixed_bytes


def require_profile(profile: Any) -> None:
    if not isinstance(profile, StepProfile):
        raise TypeError(f"the profile must be a StepProfile, as bptt_jax.profile measures one, got {profile!r}.")


def _check_counts(profile: Any, at_least_1: tuple[str, ...] = ()) -> None:
    """Checks that the sizes of a frozen record are counts of bytes or steps, and stores them as plain ints."""
    name = type(profile).__name__
    if not isinstance(profile.times, StepTimes):
        raise TypeError(f"{name}.times must be StepTimes, got {profile.times!r}.")
    for field in dataclasses.fields(profile):
        if field.name not in ("times", "sweep"):
            least = int(field.name in at_least_1)
            count = as_count(getattr(profile, field.name), least, f"{name}.{field.name}")
            object.__setattr__(profile, field.name, count)
