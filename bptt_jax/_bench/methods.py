"""The methods compared, in the order of the table: `lax.scan` and other scans, and this library over budgets."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence

from jax import lax

from bptt_jax._bench.peers import Scan, checkpointed_step, equinox, mapped, nests, ours, unrolled
from bptt_jax._budget import Budget
from bptt_jax._jaxprs.types import Device

EQUINOX_SLOTS = (10, 16, 44)
UNROLLED_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another scan, by its name in the table."""

    name: str
    scan: Scan

    def scan_for(self, device: Device) -> Scan:
        """The scan for a device to compile for: it plans nothing, so it is the same for all."""
        return self.scan


@dataclasses.dataclass(frozen=True)
class Ours:
    """This library within a budget; with `vmap`, of one example, mapped over the batch."""

    budget: Budget
    vmap: bool = False

    @property
    def name(self) -> str:
        asked = f"{self.budget:,} bytes" if isinstance(self.budget, int) else self.budget or "no budget"
        return f"bptt_jax, {asked}{', vmap' * self.vmap}"

    def scan_for(self, device: Device) -> Scan:
        """The scan with a plan for a device to compile for; None for the default backend."""
        return self.scan_with(budget=self.budget, target=device)

    def scan_with(self, **options: object) -> Scan:
        """The scan with other options, for example a plan."""
        return mapped(ours(**options)) if self.vmap else ours(**options)


Method = Peer | Ours


def methods(length: int, budgets: Sequence[Budget], vmap: bool = False) -> list[Method]:
    """All methods for a scan of this length, `lax.scan` first.

    Args:
      length: the number of steps.
      budgets: of this library.
      vmap: whether `lax.scan` and this library under `jax.vmap` are among them.
    """
    peers: dict[str, Scan] = {"lax.scan": lax.scan, f"lax.scan, unroll={UNROLLED_STEPS}": unrolled(UNROLLED_STEPS)}
    peers |= {"scan(checkpoint(step))": checkpointed_step, **nests(length)}
    if importlib.util.find_spec("equinox") is not None:
        peers |= {f"Equinox, {slots} slots": equinox(slots) for slots in EQUINOX_SLOTS if slots < length}
    found: list[Method] = [Peer(name, scan) for name, scan in peers.items()]
    found += [Ours(budget) for budget in budgets]
    if vmap:
        found += [Peer("lax.scan, vmap", mapped(lax.scan)), *(Ours(budget, vmap=True) for budget in budgets)]
    return found
