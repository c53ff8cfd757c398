"""`StepProfile`: plain numbers about one step, all that a planner may know of it."""

from __future__ import annotations

import dataclasses

from bptt_jax._plan import _as_count


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Sizes of one step of a scan, in bytes.

    `bptt_jax.profile` measures one; by hand it is just as good:

    >>> profile = StepProfile(carry_bytes=32_768, residual_bytes=196_608, x_bytes=16_384, y_bytes=16_384)
    >>> profile.store_all_bytes(1000)
    196608000

    Attributes:
      carry_bytes: one carry, without what every step passes on unchanged.
      residual_bytes: what the backward of one step needs and a loop of steps keeps for it.
      x_bytes: one step's slice of `xs`.
      y_bytes: one step's output `y`.
      param_bytes: the closed-over floating arrays, each of which has a gradient.
      fixed_bytes: what a backward pass needs whatever its length and plan.
    """

    carry_bytes: int
    residual_bytes: int
    x_bytes: int = 0
    y_bytes: int = 0
    param_bytes: int = 0
    fixed_bytes: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            count = _as_count(getattr(self, field.name), 0, f"StepProfile.{field.name}")
            object.__setattr__(self, field.name, count)

    def store_all_bytes(self, length: int) -> int:
        """Temporary bytes of `jax.lax.scan`'s own vjp over (params, init, xs): every step's residuals are kept.

        Equals `cost(Steps(length), self).peak_bytes`, since that plan is `jax.lax.scan`.
        """
        return length * self.residual_bytes + self.param_bytes + self.fixed_bytes
