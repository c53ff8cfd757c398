"""The collectives of a compiled program and the loops around them, from its optimised HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from bptt_jax._bench.launches import Instruction, parse, trips

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")
_CALLS = ("to_apply", "calls", "called_computations", "branch_computations", "true_computation", "false_computation")
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+))\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective, as often as it stands in the program.

    Attributes:
      kind: one of KINDS.
      loops: the trip counts of the loops around it, the outermost first; None where XLA does not tell, as on a TPU.
      result_bytes: of its result on each device. Of an asynchronous one the operands count too.
    """

    kind: str
    loops: tuple[int | None, ...]
    result_bytes: int

    @property
    def moved_bytes(self) -> int:
        """Bytes of its results over all iterations; the trip counts must be known."""
        return self.result_bytes * math.prod(n for n in self.loops if n is not None)


def collectives(hlo_text: str) -> list[Collective]:
    """The collectives of a program, from `compiled.as_text()`; those of a computation for each call of it."""
    computations, entry = parse(hlo_text)

    def found_in(computation: str, loops: tuple[int | None, ...]) -> Iterator[Collective]:
        for instruction in computations[computation]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                yield Collective(kind, loops, _result_bytes(instruction))
            elif instruction.opcode == "while":
                for part in ("body", "condition"):
                    for name in instruction.called(part):
                        yield from found_in(name, (*loops, trips(instruction)))
            else:
                for name in (name for attribute in _CALLS for name in instruction.called(attribute)):
                    yield from found_in(name, loops)

    return list(found_in(entry, ()))


def in_loops(found: Iterable[Collective]) -> list[Collective]:
    return [collective for collective in found if collective.loops]


def moved_bytes(found: Iterable[Collective], kind: str) -> int:
    """Bytes of the results of a kind of collective, over all iterations."""
    return sum(collective.moved_bytes for collective in found if collective.kind == kind)


def _result_bytes(instruction: Instruction) -> int:
    """Of all arrays of the result's type, which stands between the name and the opcode."""
    type_ = instruction.line.split(f" {instruction.opcode}(", 1)[0].split(" = ", 1)[1]
    sizes = (
        math.prod(map(int, filter(None, dimensions.split(",")))) * max(int(bits or 8) // 8, 1)
        for _, bits, dimensions in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", type_))
    )
    return sum(sizes)
