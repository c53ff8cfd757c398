"""Bytes, by compiling: what XLA reports over what is predicted, for plans of all sizes of the audit's kinds of step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import bptt_jax
from bptt_jax import _figures
from bptt_jax._verify.check import check
from bptt_jax._verify.ladder import Plans
from tests.audit import Case, gradient
from tests.audit.kinds import KINDS

LENGTH, PLANS = 100, 4
OF_EVERYTHING = "everything kept"


def ratios(lowering: str, kinds: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    """(kind, plan, measured over predicted): plans from the smallest to the one that keeps everything."""
    for kind in kinds:
        case = Case(kind, LENGTH, lowering)
        whole = gradient(case, case.problem(), None)
        plans = Plans(whole)
        smallest, everything = plans.last_resorts()[0], plans.within(10**15)
        assert everything is not None
        sizes = np.geomspace(smallest.predicted_bytes, everything.predicted_bytes, PLANS)[1:-1]
        between = [plan for plan in map(plans.within, map(int, sizes)) if plan is not None]
        for candidate in dict.fromkeys([smallest, *between, everything]):
            measured = check(whole, candidate.plan, candidate.form).temporary_bytes
            name = OF_EVERYTHING if candidate == everything else bptt_jax.plans.notation(candidate.plan)
            yield kind, name, measured / candidate.predicted_bytes


def counter_bytes() -> int:
    """What a gradient of steps of one number takes, beside its carries and residuals; the least of both lowerings."""
    one = jnp.ones((), jnp.float32)
    found = []
    for lowering in ("sweep", "nested"):
        report = bptt_jax.explain(
            lambda carry, x: (jnp.sin(carry), None), one, length=8, plan=bptt_jax.Steps(8), lowering=lowering
        )
        run = report.profile.sweep or report.profile
        by_step = 8 * (run.residual_bytes + getattr(run, "block_bytes", 0))
        found.append(report.measured_bytes - by_step - 2 * run.carry_bytes)
    return min(found)


def rows(kinds: Sequence[str] = tuple(KINDS)) -> Iterator[tuple[str, str, str, str]]:
    """(figure, now, derived, binds)."""
    jax.config.update("jax_enable_x64", True)
    found = [(low, *one) for low in ("sweep", "nested") for one in ratios(low, kinds)]
    for lowering, rows_of in itertools.groupby(found, key=lambda one: one[0]):
        shares = [share for *_, share in rows_of]
        low, median, high = np.percentile(shares, [5, 50, 95])
        yield (
            f"measured / predicted, {lowering}",
            "1",
            f"{median:.2f} ({low:.2f} to {high:.2f})",
            f"{len(shares)} plans",
        )
    lowering, kind, _, most = max((one for one in found if one[2] == OF_EVERYTHING), key=lambda one: one[3])
    yield "CERTAINLY_FITS", str(_figures.CERTAINLY_FITS), f"at least {most:.2f}", f"{kind}, {lowering}"
    covered = np.mean([share <= 1 + _figures.ESTIMATE_MARGIN for *_, share in found])
    lowering, kind, plan, most = max(found, key=lambda one: one[3])
    binds = f"{kind}, {lowering}, {plan}"
    yield "ESTIMATE_MARGIN", str(_figures.ESTIMATE_MARGIN), f"covers {covered:.0%}; all: {most - 1:.2f}", binds
    yield "COUNTER_BYTES", str(_figures.COUNTER_BYTES), f"{counter_bytes()}", "steps of one number"
