"""Sizes and relative times of one step, which planners compare plans by: pure numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from bptt_jax.errors import as_count

Lowering = Literal["nested", "sweep"]


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """How long the parts of a scan take, relative to each other; planners compare plans by it.

    >>> StepTimes(backward=2.5).of_everything_kept(1000)
    3500.0

    Attributes:
      forward: one step that is evaluated without keeping anything.
      recording: one step that is evaluated and of which the residuals are kept.
      backward: one step backwards.
      block: what running a block of steps costs beside its steps, each time that it is evaluated. It makes planners
        prefer long blocks.
    """

    forward: float = 1.0
    recording: float = 1.0
    backward: float = 2.0
    block: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"StepTimes.{field.name} must be a number, got {value!r}.")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"StepTimes.{field.name} must be finite and not negative, got {value}.")
            object.__setattr__(self, field.name, float(value))

    def of_everything_kept(self, length: int) -> float:
        """The time of a gradient that keeps the residuals of all its steps."""
        return length * (self.recording + self.backward) + (self.block if length else 0.0)


@dataclasses.dataclass(frozen=True)
class SweepProfile:
    """Sizes of one step as the sweep runs it, in bytes: in blocks, whose matrix products are taken out of their loops.

    Attributes:
      carry_bytes: one carry, without what every step passes on unchanged.
      residual_bytes: what the backward of one step needs and a block keeps for it.
      block_bytes: what a block holds for each of its steps while it is worked on, beside their residuals.
      operand_bytes: of residual_bytes, what a block holds until its end, for the products over all of its steps.
      product_bytes: the results of these products, before they are added to the gradients.
      block_steps: the length of the longest block; longer `Steps` are run as several.
      copied_bytes: what is there for each step of the scan from first to last, whatever the plan: copies of xs and ys.
      fixed_bytes: what a backward pass needs whatever its length and plan.
      times: relative times.
    """

    carry_bytes: int
    residual_bytes: int
    block_bytes: int = 0
    operand_bytes: int = 0
    product_bytes: int = 0
    block_steps: int = 1
    copied_bytes: int = 0
    fixed_bytes: int = 0
    times: StepTimes = StepTimes()

    def __post_init__(self) -> None:
        _check_counts(self, at_least_1=("block_steps",))


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Sizes of one step of `jax.lax.scan`, in bytes, and what takes how long in it.

    `bptt_jax.profile` makes one from shapes; by hand it is just as good:

    >>> profile = StepProfile(carry_bytes=32_768, residual_bytes=196_608, x_bytes=16_384, y_bytes=16_384)
    >>> profile.store_all_bytes(1000)
    196608000

    Attributes:
      carry_bytes: one carry, without what every step passes on unchanged.
      residual_bytes: what the backward of one step needs and a loop of steps keeps for it.
      x_bytes: one step's slice of `xs`.
      y_bytes: one step's output `y`.
      param_bytes: the closed-over floating arrays that are differentiated, each of which has a gradient.
      fixed_bytes: what a backward pass needs whatever its length and plan.
      times: relative times, for planners only: bytes and counts of evaluations do not depend on them.
      copied_bytes: what is there for each step of the scan from first to last, whatever the plan: copies of xs and ys.
      unit_axis_bytes: the same, but for `Steps` and a loop over single steps: copies of arrays with axes of length 1.
      sweep: the sizes where plans are run as sweeps; None: as nests of `jax.checkpoint` around `jax.lax.scan`.
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
        """Temporary bytes of `jax.lax.scan` for the gradient that the profile is of: every step's residuals are kept.

        Without `sweep` it equals `cost(Steps(length), self).peak_bytes`, as that plan is `jax.lax.scan`.
        """
        return length * (self.residual_bytes + self.copied_bytes) + self.param_bytes + self.fixed_bytes


def require_profile(profile: Any) -> None:
    if not isinstance(profile, StepProfile):
        raise TypeError(f"the profile must be a StepProfile, as bptt_jax.profile measures one, got {profile!r}.")


def _check_counts(profile: Any, at_least_1: tuple[str, ...] = ()) -> None:
    """Whether all sizes of a frozen record are counts of bytes or steps, which it gets as plain ints."""
    name = type(profile).__name__
    if not isinstance(profile.times, StepTimes):
        raise TypeError(f"{name}.times must be StepTimes, got {profile.times!r}.")
    for field in dataclasses.fields(profile):
        if field.name not in ("times", "sweep"):
            least = int(field.name in at_least_1)
            count = as_count(getattr(profile, field.name), least, f"{name}.{field.name}")
            object.__setattr__(profile, field.name, count)
