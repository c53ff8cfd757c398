"""`largest_budget`: compiles a whole program a few times, to find the largest budget with which it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from bptt_jax._device.processes import greatest_of_processes
from bptt_jax._jaxprs.types import Device, Tree
from bptt_jax._options import check_options
from bptt_jax._whole.program import Program, argument_bytes, placed, traced
from bptt_jax._whole.report import FitReport, does_not_fit
from bptt_jax._whole.search import LEAST_BUDGET, Answer, PutOff, Refused, Taken, search
from bptt_jax._whole.within import within_bytes
from bptt_jax.errors import BudgetError


def largest_budget(
    make: Callable[[int], Any], *args: Tree, within: int | str, target: Device = None
) -> tuple[int, FitReport]:
    """The largest budget with which a whole program, such as a training step, fits on a device; and a report.

    A budget counts the temporaries of one scan. Beside them a program has arguments (weights, the optimiser's state, a
    batch), results, and other temporaries (outputs of layers, logits). How much of these is held while the scan is at
    its peak is known to the compiler alone. So the program is compiled, one to four times, with budgets approaching the
    limit; nothing is run. The scans' own checks come on top, for up to two dozen budgets, and are remembered.

    Counted are the bytes of one device: arguments + results - aliases (results in the place of donated arguments) +
    temporaries + machine code, where `memory_analysis()` reports some.

    Args:
      make: from a budget in bytes to a jitted function whose scans or layers have this budget, and where nothing else
        depends on it: functions whose scans have equal plans count as equal. For several layers divide it: `share_budget(budget, layers)` of `bptt_jax.linen` and `bptt_jax.nnx`. It may return whatever has a
        method `lower`, as results of `jax.jit`, `flax.nnx.jit` and `equinox.filter_jit` have. Donate
        arguments to be overwritten (`donate_argnums`); otherwise they count twice, as they do when it runs.
      *args: the function's arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s, with the shardings of the run;
        `equinox.filter_jit` lowers for arrays alone.
      within: the limit: bytes as an int, a string such as "14GiB", or "auto". "auto" is nine tenths of the bytes
        free on the device, or held there by `args`; on CPU the devices of the process share them.
      target: the device to compile for, if it is not the default backend; see `bptt_jax.scan`. Shapes without a
        sharding, and arrays, are taken to be on it. Plans follow from the option of the same name in the scans, so
        `make` passes it as well: `bptt_jax.scan(..., budget=budget, target=target)`.

    Returns:
      (budget, report): the budget in bytes, as an int, for the scans and layers; and a `FitReport`. If the program fits
      while its scans keep everything, the budget lets them do so; of other programs found to fit, it is the one whose
      scans take the most.

    Raises:
      FitError: if the program does not fit with the smallest budget; it has the shares of its bytes.
      TypeError, ValueError: for a malformed `within`; if "auto" is asked of a device unable to tell; if `make` is not
        callable, or returns a function without `lower`.
      Exception: as `make` and its function raise it.

    >>> import jax, jax.numpy as jnp
    >>> from bptt_jax import largest_budget, scan
    >>> def make(budget):
    ...     def step(w, xs):
    ...         loss = lambda w: scan(lambda c, x: (jnp.tanh(w * c + x),) * 2, jnp.zeros(64), xs, budget=budget)[1].sum()
    ...         return w - 0.1 * jax.grad(loss)(w)
    ...     return jax.jit(step, donate_argnums=0)
    >>> shapes = jax.ShapeDtypeStruct((64,), "float32"), jax.ShapeDtypeStruct((2000, 64), "float32")
    >>> budget, report = largest_budget(make, *shapes, within="1.1MiB")
    >>> 0.93 < report.chosen.total_bytes / report.within_bytes <= 1, len(report.programs) <= 4
    (True, True)

    Not for one scan by itself, whose budget is in bytes already. On accelerators the allocator needs some room for
    fragments: leave it a few per cent.
    """  # noqa: E501  an example's line
    if not callable(make):
        raise TypeError(
            f"make must be a function from a budget to a jitted function, got {make!r}. Did you mean "
            "largest_budget(lambda budget: jax.jit(...), *args)?"
        )
    check_options(None, None, None, True, target)
    limit = within_bytes(within, args, target)
    given = placed(args, target)
    programs: list[Program] = []
    errors: list[BudgetError] = []
    known: dict[Any, Taken] = {}

    def attempt(budget: int, worth: Callable[[int], bool]) -> Answer:
        try:
            program = traced(make, budget, given)
        except BudgetError as error:
            errors.append(error)
            return _refused(budget, error)
        plans = program.scans.plans
        if plans in known:
            return dataclasses.replace(known[plans], budget=budget, is_compiled=False)
        if not worth(program.scans.temporary_bytes):
            return PutOff(budget, program.scans.temporary_bytes)
        programs.append(program.compile())
        total = greatest_of_processes(programs[-1].total_bytes)
        known[plans] = Taken(budget, program.scans.temporary_bytes, total, program.scans.is_everything)
        return known[plans]

    outcome = search(limit, max(limit - argument_bytes(given, target), LEAST_BUDGET), attempt)
    if not programs:
        raise errors[-1]
    if outcome.best is None:
        raise does_not_fit(within, limit, programs, outcome.least)
    chosen = programs[outcome.taken.index(outcome.best)]
    return chosen.budget_bytes, FitReport(limit, tuple(programs), chosen, outcome.refused, target)


def _refused(budget: int, error: BudgetError) -> Refused:
    """The smallest budget by an error on one scan, which has perhaps only a part of it.

    Raises:
      BudgetError: the same, if the scan's own budget does not follow the one of `make`.
    """
    part = error.smallest_bytes / error.budget_bytes
    smallest = -int(-budget * part // 1)
    if error.smallest_bytes <= error.budget_bytes or smallest <= budget:
        raise error
    return Refused(budget, smallest)
