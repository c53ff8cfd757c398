"""How many kernels and copies a GPU is sent by a compiled program, counted in its optimised HLO text.

Small recurrent steps are bound by launches there, so this is a figure of merit without noise, and without a GPU where
the program is compiled for one. An instruction left standing in the entry computation, or in the computation of a loop,
a call or a branch, is one launch, times the trip counts of the loops around it; a fusion is one kernel with all that is
inside of it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

# Names for values that exist already, and control flow, whose insides are counted instead.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "add-dependency", "opt-barrier", "partition-id", "replica-id"),
}
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s.*\{$")
_NAME = re.compile(r"^\s+(?:ROOT\s+)?%?([\w.\-]+) = ")
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation: its name, its opcode, and the whole line."""

    name: str
    opcode: str
    line: str

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names: `body=%a`, or `branch_computations={%a, %b}`."""
        found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", self.line)
        return re.findall(r"[\w.\-]+", found[1] or found[2]) if found else []


def launches(hlo_text: str) -> int:
    """The launches of a program, from `compiled.as_text()`.

    Of a conditional the branch with most launches counts.

    Raises:
      ValueError: for a loop whose trip count XLA does not know, or a text without an entry computation.

    >>> text = '''
    ... body (c: f32[8]) -> f32[8] {
    ...   c = f32[8] parameter(0)
    ...   ROOT d = f32[8] fusion(c), kind=kLoop, calls=step
    ... }
    ... ENTRY main (x: f32[8]) -> f32[8] {
    ...   x = f32[8] parameter(0)
    ...   y = f32[8] while(x), body=body, backend_config={"known_trip_count":{"n":"5"}}
    ...   ROOT z = f32[8] copy(y)
    ... }'''
    >>> launches(text)  # the copy, and five times the fusion
    6
    """
    computations, entry = parse(hlo_text)

    @functools.cache
    def count(computation: str) -> int:
        return sum(map(count_one, computations[computation]))

    def count_one(instruction: Instruction) -> int:
        match instruction.opcode:
            case "while":
                # A GPU that knows the trip count counts on the host: the condition is not evaluated.
                return _known_trips(instruction) * sum(map(count, instruction.called("body")))
            case "call":
                return sum(map(count, instruction.called("to_apply")))
            case "conditional":
                branches = ("branch_computations", "true_computation", "false_computation")
                return max(count(name) for attribute in branches for name in instruction.called(attribute))
        # What an asynchronous operation sends it sends when it starts.
        is_free = instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update"))
        return int(not is_free)

    return count(entry)


def _known_trips(loop: Instruction) -> int:
    known = trips(loop)
    if known is None:
        raise ValueError(f"the loop {loop.name} has no known_trip_count, so its launches cannot be counted.")
    return known


def trips(loop: Instruction) -> int | None:
    """How often a `while` runs, where XLA tells."""
    found = _TRIPS.search(loop.line)
    return int(found[1]) if found else None


def parse(hlo_text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation by its name, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry = None
    for line in hlo_text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith("HloModule"):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif instruction := _instruction(line):
            computations[name].append(instruction)
    if entry is None:
        raise ValueError("this text has no ENTRY computation; pass what compiled.as_text() returns.")
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    named = _NAME.match(line)
    if not named:
        return None
    rest = line[named.end() :]
    # The type comes first and, for a tuple, has spaces and parentheses of its own.
    end = next(i for i, depth in _depths(rest) if depth == 0 and rest[i + 1 : i + 2] == " ")
    return Instruction(named[1], rest[end + 2 :].split("(", 1)[0], line)


def _depths(text: str) -> Iterator[tuple[int, int]]:
    """For each character its index, and how many parentheses are open after it."""
    depth = 0
    for i, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        yield i, depth
