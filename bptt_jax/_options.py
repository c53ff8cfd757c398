"""The options of a scan, checked once, at the door."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bptt_jax._budget import Budget, budget_to_bytes
from bptt_jax._device.machine import Machine, machine_for
from bptt_jax._jaxprs.types import Device
from bptt_jax.plans._memories import uses_host
from bptt_jax.plans._nodes import Plan
from bptt_jax.plans._notation import parse
from bptt_jax.plans._profile import Lowering


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `scan`, beside the step and its arguments; see there. Hashable.

    Attributes:
      machine: the device to compile for.
      host_budget: bytes in the host's memory; see `scan`.
      show_recomputation: whether callbacks for debugging run in steps evaluated again as well.
      progress: the label of the bar of progress; None for no bar.
    """

    machine: Machine
    budget: Budget = None
    plan: Plan | None = None
    lowering: Lowering | None = None
    verify: bool = True
    show_recomputation: bool = False
    host_budget: Budget = None
    progress: str | None = None

    @property
    def may_use_host(self) -> bool:
        """Whether a plan may keep values in the host's memory; on CPU there is only one memory."""
        asked = self.host_budget is not None or (self.plan is not None and uses_host(self.plan))
        return asked and not self.machine.is_cpu


_shows_recomputation = contextvars.ContextVar("shows_recomputation", default=False)


@contextlib.contextmanager
def show_recomputation() -> Iterator[None]:
    """A context whose scans run the callbacks of `jax.debug` in steps evaluated again too, so recomputation shows.

    Without it each callback runs once a step, in the first pass, whatever the plan. It acts on scans traced within it:
    a function that was traced by `jax.jit` before stays as it is.

    >>> import jax, jax.numpy as jnp
    >>> from bptt_jax import scan
    >>> seen = []
    >>> def step(carry, x):
    ...     jax.debug.callback(lambda x: seen.append(float(x)), x)
    ...     return jnp.sin(carry * x), None
    >>> loss = lambda init: scan(step, init, jnp.ones(6), plan="(2*[3])")[0]
    >>> gradient = jax.grad(loss)(0.5)
    >>> jax.effects_barrier()
    >>> len(seen)
    6
    >>> with show_recomputation():
    ...     gradient = jax.grad(loss)(0.5)
    >>> jax.effects_barrier()
    >>> len(seen) - 6
    12
    """
    token = _shows_recomputation.set(True)
    try:
        yield
    finally:
        _shows_recomputation.reset(token)


def is_budget(given: Any) -> bool:
    """Whether a string in the place of another argument is meant as a budget."""
    if not isinstance(given, str):
        return False
    try:
        return given == "auto" or budget_to_bytes(given, store_all_bytes=1) is not None
    except (TypeError, ValueError):
        return False


def check_flags(flags: Mapping[str, Any]) -> None:
    """Raises for flags that are no bools: a budget in the place of a flag would count as True without a word."""
    for name, given in flags.items():
        if not isinstance(given, bool | np.bool_):
            meant = f" Did you mean budget={given!r}?" if is_budget(given) else ""
            raise TypeError(f"{name} must be True or False, got {given!r}.{meant}")


def check_progress(progress: Any) -> None:
    """Raises for a `progress` that is no label and no switch."""
    if progress == "" or not isinstance(progress, str | bool | np.bool_ | None):
        raise TypeError(f'progress must be a label such as "training", True, False or None, got {progress!r}.')


def label_of(progress: Any, default: str) -> str | None:
    """The label of a bar; None for no bar. True stands for a default."""
    return progress if isinstance(progress, str) else default if progress else None


def check_options(
    budget: Any,
    plan: Any,
    lowering: Any,
    verify: Any,
    target: Device = None,
    host_budget: Any = None,
    progress: Any = None,
) -> None:
    """Raises for malformed options, whatever the step, so also where nothing is differentiated."""
    if lowering not in (None, "sweep", "nested"):
        raise ValueError(f'lowering={lowering!r} is unknown; use None (the sweep where it can), "sweep" or "nested".')
    if budget != "auto":  # converted only to check its form, so any size of the scan serves
        budget_to_bytes(budget, store_all_bytes=1)
    budget_to_bytes(host_budget, store_all_bytes=1, name="host_budget")
    if host_budget is not None and budget is None:
        raise ValueError(
            f"host_budget={host_budget!r} needs a budget: without one, everything is kept on the device, or where a "
            "plan says."
        )
    if not isinstance(verify, bool):
        raise TypeError(f"verify must be True or False, got {verify!r}.")
    if isinstance(plan, str):
        parse(plan)
    elif plan is not None and not isinstance(plan, Plan):
        raise TypeError(
            f"plan must be a plan (Steps, Repeat, Chain or Remat), its notation as a string, or None, got {plan!r}."
        )
    if plan is not None and budget is not None:
        raise ValueError(f"got budget={budget!r} and a plan: a plan is run as it is; pass one of the two.")
    if target is not None and not isinstance(getattr(target, "platform", None), str):
        raise TypeError(
            f"target must be a device, such as one of jax.experimental.topologies.get_topology_desc(...).devices, or "
            f"None, got {target!r}."
        )
    check_progress(progress)


def checked_options(
    budget: Budget = None,
    plan: Plan | str | None = None,
    lowering: Lowering | None = None,
    verify: bool = True,
    target: Device = None,
    host_budget: Budget = None,
    progress: str | bool | None = None,
) -> Options:
    """The options, for the machine of a target or of the default backend.

    Raises: as `check_options`.
    """
    check_options(budget, plan, lowering, verify, target, host_budget, progress)
    made = parse(plan) if isinstance(plan, str) else plan
    shown, label = _shows_recomputation.get(), label_of(progress, "scan")
    return Options(machine_for(target), budget, made, lowering, verify, shown, host_budget, label)
