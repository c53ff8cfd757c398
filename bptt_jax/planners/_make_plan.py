"""The door to the planners: from the sizes of a step, a length and a budget to a plan.

Each lowering has a planner of its own with the same two functions, `fastest` and `smallest_plan`: `_nested/octaves.py`
and `_sweep/families.py`.
"""

from __future__ import annotations

import dataclasses
import functools

from bptt_jax._budget import budget_to_bytes
from bptt_jax._caches import remember
from bptt_jax._cost.cost import cost
from bptt_jax._cost.time import predicted_time
from bptt_jax.errors import FIXED_PART, BudgetError, as_count
from bptt_jax.planners import _with_host
from bptt_jax.planners._nested import octaves
from bptt_jax.planners._sweep import families
from bptt_jax.plans._nodes import Plan, Remat, Repeat, Steps
from bptt_jax.plans._nodes import length as length_of
from bptt_jax.plans._profile import StepProfile, require_profile


def make_plan(
    profile: StepProfile, length: int, budget: int | str | None = None, host_budget: int | str | None = None
) -> Plan:
    """The fastest plan found whose peak fits the budget, of at most 8 copies of the step's loop.

    It comes from a search, and need not be the optimum: "How near the optimum" in bptt_jax/planners/README.md has
    measured how much faster another plan may be.

    Args:
      profile: sizes and relative times of one step.
      length: number of steps, ≥ 0.
      budget: temporary bytes of the backward pass: an int, a string such as "64MiB", or "5%" of
        `profile.store_all_bytes(length)`. None keeps everything.
      host_budget: bytes in the host's memory, likewise; None is none. Sweeps may keep residuals and carries there,
        nests of `jax.checkpoint` carries. Time to move bytes is `profile.times.transfer`; what is moved beside other
        work takes none.

    The plan is in normal form. Each `Remat` is the child of a `Repeat` with k ≥ 2. The children of a `Chain` are loops
    of this kind, but the last child may be any node except a `Remat`. Results are remembered by profile, length and
    budgets.

    Raises:
      BudgetError: if nothing fits; it names the smallest budget with a plan.
      TypeError: if `profile` is not a `StepProfile`.
      TypeError, ValueError: for a malformed budget, one for the host alone, or a negative length.

    >>> profile = StepProfile(carry_bytes=1, residual_bytes=4)
    >>> make_plan(profile, 100)
    Steps(n=100)
    >>> make_plan(profile, 1000, "10%")
    Chain(children=(Repeat(k=10, child=Remat(child=Steps(n=91))), Steps(n=90)))
    >>> make_plan(profile, 1000, 60, host_budget=100)
    Chain(children=(Repeat(k=71, child=Remat(child=Steps(n=14)), kept='host'), Steps(n=6)))
    """
    require_profile(profile)
    length = as_count(length, 0, "length")
    budget_bytes = budget_to_bytes(budget, profile.store_all_bytes(length))
    if budget is None and host_budget is not None:
        raise ValueError(f"host_budget={host_budget!r} needs a budget: without one, everything is kept on the device.")
    host_bytes = budget_to_bytes(host_budget, profile.store_all_bytes(length), "host_budget") or 0
    plan = Steps(length) if budget_bytes is None else fastest_plan(profile, length, budget_bytes, host_bytes)
    if plan is None:
        assert budget_bytes is not None
        least = smallest_plan(profile, length, host_bytes)
        smallest = cost(least, profile).peak_bytes
        raise BudgetError(length, budget, budget_bytes, smallest, shares(profile, least, smallest))
    return plan


@remember(1024)
def fastest_plan(profile: StepProfile, length: int, budget_bytes: int, host_bytes: int = 0) -> Plan | None:
    """`make_plan` for budgets in bytes; None if nothing fits."""
    everything = Steps(length)
    if cost(everything, profile).peak_bytes <= budget_bytes:
        return everything
    if host_bytes == 0:
        return _of_device(profile, length, budget_bytes)
    on_device = functools.partial(fastest_plan, profile)
    plan = _with_host.fastest(profile, length, budget_bytes, host_bytes, on_device)
    # The candidates depend on the budget, and an error names the bytes of the smallest plan as the least accepted.
    least = smallest_plan(profile, length, host_bytes) if plan is None else plan
    return least if cost(least, profile).peak_bytes <= budget_bytes else None


def _of_device(profile: StepProfile, length: int, budget_bytes: int) -> Plan | None:
    bare = _bare(profile)
    # Planners get the budget without the copies of xs and ys, because these exist under any plan.
    if profile.sweep is not None and bare.sweep is not None:
        return families.fastest(bare.sweep, length, budget_bytes - length * profile.sweep.copied_bytes)
    plan = octaves.fastest(bare, length, budget_bytes - length * (profile.copied_bytes + profile.unit_axis_bytes))
    single = _single_steps(profile, length)
    if cost(single, profile).peak_bytes > budget_bytes:
        return plan
    return min(filter(None, (plan, single)), key=lambda plan: predicted_time(plan, profile.times))


@remember(256)
def smallest_plan(profile: StepProfile, length: int, host_bytes: int = 0) -> Plan:
    """The plan of the fewest bytes on the device found by the planners."""
    alone = _smallest_of_device(profile, length)
    return _with_host.smallest_plan(profile, length, host_bytes, alone) if host_bytes else alone


def _smallest_of_device(profile: StepProfile, length: int) -> Plan:
    bare = _bare(profile)
    if bare.sweep is not None:
        return families.smallest_plan(bare.sweep, length)
    plans = octaves.smallest_plan(bare, length), _single_steps(profile, length)
    return min(plans, key=lambda plan: cost(plan, profile).peak_bytes)


def _bare(profile: StepProfile) -> StepProfile:
    """The profile without the copies of all xs and ys, because these do not depend on the plan."""
    sweep = None if profile.sweep is None else dataclasses.replace(profile.sweep, copied_bytes=0)
    return dataclasses.replace(profile, copied_bytes=0, unit_axis_bytes=0, sweep=sweep)


def _single_steps(profile: StepProfile, length: int) -> Plan:
    """One loop over single steps, where it saves copies of arrays with axes of length 1; else everything kept."""
    return Repeat(length, Remat(Steps(1))) if profile.unit_axis_bytes and length > 1 else Steps(length)


def shares(profile: StepProfile, plan: Plan, smallest: int) -> dict[str, int]:
    """The parts of the smallest budget by name: predicted parts of its plan, scaled to add up to `smallest`."""
    run, sweep = profile.sweep or profile, profile.sweep
    products, working = (profile.param_bytes, 0) if sweep is None else (sweep.product_bytes, sweep.block_bytes)
    made_of = {
        FIXED_PART: run.fixed_bytes + products,
        "what one step keeps for its backward": run.residual_bytes + working,
        "copies that XLA makes of all xs or ys": length_of(plan) * run.copied_bytes,
    }
    predicted = max(cost(plan, profile).peak_bytes, sum(made_of.values()), 1)
    made_of = {name: size * smallest // predicted for name, size in made_of.items()}
    return made_of | {f"carries ({run.carry_bytes:,} bytes each) and copies": smallest - sum(made_of.values())}
