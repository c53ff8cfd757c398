"""`StepProfile`: plain numbers about one step, all that a planner may know of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

from bptt_jax._plan import _as_count

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
class StepProfile:
    """Sizes of one step of a scan, in bytes, and what takes how long in it.

    `bptt_jax.profile` measures one; by hand it is just as good:

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
      block_bytes: what a block holds for each of its steps while it is worked on, beside their residuals.
      stacked_bytes: of block_bytes, the cotangents that leave the loop over a block's steps.
      advance_bytes: what a block holds for each of its steps while they are only advanced.
      left_bytes: of residual_bytes, what a block holds until its end, for the products over all of its steps.
      reread_bytes: of left_bytes, what the steps' backward reads as well: of blocks in a row it is there once more.
      reread_ct_bytes: cotangents of ys that these products read, and the steps' backward as well: likewise, as long as
        the products outweigh them.
      product_bytes: the results of these products, before they are added to the gradients.
      block_steps: the length of the longest block; longer `Steps` are run as several.
      block_peaks: lengths of blocks, ascending, with the bytes that XLA reports for a loop over such blocks without
        their carries, on accelerators with room for what other blocks take. They take the place of block_bytes,
        left_bytes and product_bytes, and are interpolated. Empty: not measured.
      ahead_bytes: for each step of a block of the loops, the inputs that are there beside a last block: none where the
        inputs are differentiated, for then a block takes more at another time.
      moved_bytes: for each step of a last block, what of x or y is there once more, because it has time elsewhere.
      loop_bytes: what each loop of a plan but one takes beside its children, whatever these are: counters, and tables
        of the arrays that it hands on.
      copied_bytes: what is there for each step of the scan from first to last, whatever the plan: copies of xs and ys.
      nest_copied_bytes: the same, but for `Steps` and a loop over single steps: copies of arrays with axes of length 1.
      margin: what is added to a predicted peak, relative to it.
      plain: the profile of `jax.lax.scan` for the same step, where the other numbers are those of the sweep. None: they
        are those of `jax.lax.scan` and of the nest that is made of it.
    """

    carry_bytes: int
    residual_bytes: int
    x_bytes: int = 0
    y_bytes: int = 0
    param_bytes: int = 0
    fixed_bytes: int = 0
    times: StepTimes = StepTimes()
    block_bytes: int = 0
    stacked_bytes: int = 0
    advance_bytes: int = 0
    left_bytes: int = 0
    reread_bytes: int = 0
    reread_ct_bytes: int = 0
    product_bytes: int = 0
    block_steps: int = 1
    block_peaks: tuple[tuple[int, int], ...] = ()
    ahead_bytes: int = 0
    moved_bytes: int = 0
    loop_bytes: int = 0
    copied_bytes: int = 0
    nest_copied_bytes: int = 0
    margin: float = 0.0
    plain: StepProfile | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.times, StepTimes):
            raise TypeError(f"StepProfile.times must be StepTimes, got {self.times!r}.")
        if self.plain is not None and (not isinstance(self.plain, StepProfile) or self.plain.plain is not None):
            raise TypeError(f"StepProfile.plain must be the profile of a nest or None, got {self.plain!r}.")
        for field in dataclasses.fields(self):
            if field.name in ("times", "plain", "block_peaks", "margin"):
                continue
            least = 1 if field.name == "block_steps" else 0
            count = _as_count(getattr(self, field.name), least, f"StepProfile.{field.name}")
            object.__setattr__(self, field.name, count)

        if isinstance(self.margin, bool) or not isinstance(self.margin, (int, float)) or not 0 <= self.margin < 1:
            raise ValueError(f"StepProfile.margin must be a number in [0, 1), got {self.margin!r}.")
        object.__setattr__(self, "block_peaks", _as_peaks(self.block_peaks))

    def with_margin(self, peak_bytes: int) -> int:
        """A predicted peak with its margin."""
        return peak_bytes + math.ceil(peak_bytes * self.margin)

    def within_margin(self, budget_bytes: int) -> int:
        """The largest peak that with its margin is within the budget."""
        peak_bytes = int(budget_bytes / (1 + self.margin)) + 1
        while self.with_margin(peak_bytes) > budget_bytes:
            peak_bytes -= 1
        return peak_bytes

    @property
    def lowering(self) -> Lowering:
        """How a plan for this step is run: "nested" or "sweep"."""
        return "nested" if self.plain is None else "sweep"

    def store_all_bytes(self, length: int) -> int:
        """Temporary bytes of `jax.lax.scan` for the gradient that the profile is of: every step's residuals are kept.

        Without `plain` and margin it equals `cost(Steps(length), self).peak_bytes`, as that plan is `jax.lax.scan`.
        """
        if self.plain is not None:
            return self.plain.store_all_bytes(length)
        return length * (self.residual_bytes + self.copied_bytes) + self.param_bytes + self.fixed_bytes


def _as_peaks(peaks: object) -> tuple[tuple[int, int], ...]:
    if not isinstance(peaks, Sequence) or isinstance(peaks, str):
        raise TypeError(f"StepProfile.block_peaks must be pairs of steps and bytes, got {peaks!r}.")
    checked = tuple((_as_count(n, 1, "steps of a block"), _as_count(size, 0, "bytes of a block")) for n, size in peaks)
    if any(a[0] >= b[0] or a[1] > b[1] for a, b in itertools.pairwise(checked)):
        raise ValueError(f"StepProfile.block_peaks must ascend, in steps and in bytes, got {peaks!r}.")
    return checked
