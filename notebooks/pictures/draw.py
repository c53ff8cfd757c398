"""Draws the plan of 32 steps that stands beside this file: `python notebooks/pictures/draw.py`."""

import pathlib

from bptt_jax import StepProfile, make_plan
from bptt_jax.plans import plot, svg

HERE = pathlib.Path(__file__).parent


def main() -> None:
    plan = make_plan(StepProfile(carry_bytes=1, residual_bytes=3), 32, 11)
    (HERE / "plan32.svg").write_text(svg(plan))
    plot(plan, HERE / "plan32.png")


if __name__ == "__main__":
    main()
