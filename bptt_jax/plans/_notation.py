"""The notation of a plan: one line of text, written by `notation` and read by `parse`.

    line := { name "=" part ";" } part
    part := number | number "*" part | number "@" part | "(" part { "+" part } ")" | "[" part "]" | name

`n` is Steps(n), `k*c` Repeat, `k@c` a Repeat with its kept values on the host, `(a + b)` Chain, `[c]` Remat; names are
x1, x2, ... A plan of more than 2,000
leaves when written out names its shared parts first, so the length of the line is linear in the distinct nodes.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

from bptt_jax.plans._nodes import Chain, Memory, Plan, Remat, Repeat, Steps, fold, require_plan

_LONGEST = 2000  # leaves of a line without names, at most
_SIGNS: dict[Memory, str] = {"device": "*", "host": "@"}
_TOKEN = re.compile(r"\s*(\d+\s*[*@]|\d+|x\d+\s*=|x\d+|[()\[\]+;])")


def notation(plan: Plan) -> str:
    """The notation of a plan, on one line.

    >>> notation(Chain((Repeat(40, Remat(Steps(25))), Steps(9))))
    '(40*[25] + 9)'

    Raises:
      TypeError: if `plan` is not a plan.
    """
    require_plan(plan, "the argument of notation")
    shared = _shared(plan) if _leaves(plan) > _LONGEST else set()
    definitions: list[str] = []

    def visit(node: Plan, children: Sequence[str]) -> str:
        text = _node_notation(node, children)
        if id(node) not in shared:
            return text
        name = f"x{len(definitions) + 1}"
        definitions.append(f"{name}={text}; ")
        return name

    line = fold(plan, visit)
    return "".join(definitions) + line


def parse(line: str) -> Plan:
    """The plan of a line, the inverse of `notation`.

    >>> parse("(40*[25] + 9)") == Chain((Repeat(40, Remat(Steps(25))), Steps(9)))
    True
    >>> parse("40@25")
    Repeat(k=40, child=Steps(n=25), kept='host')

    Raises:
      TypeError: if `line` is not a string.
      ValueError: if the line is not in this notation; the message has the place of the mistake. Also for an inner
        loop with values on the host.
    """
    if not isinstance(line, str):
        raise TypeError(f'parse takes a line such as "(40*[25] + 9)", got {line!r} of type {type(line).__name__}.')
    return _Parser(line).run()


def _leaves(plan: Plan) -> int:
    return fold(plan, lambda node, children: sum(children) if children else 1)


def _shared(plan: Plan) -> set[int]:
    """Ids of the nodes with more than one parent, without leaves, because a leaf is as short as a name."""
    parents: collections.Counter[int] = collections.Counter()
    fold(plan, lambda node, _: parents.update(id(child) for child in node._children if child._children))
    return {node for node, count in parents.items() if count > 1}


def _node_notation(node: Plan, children: Sequence[str]) -> str:
    match node:
        case Steps(n):
            return str(n)
        case Repeat(k, _, kept):
            return f"{k}{_SIGNS[kept]}{children[0]}"
        case Remat():
            return f"[{children[0]}]"
        case Chain():
            return f"({' + '.join(children)})"
    raise TypeError(f"not a plan node: {node!r}")


class _Parser:
    """A parser with an explicit stack, because plans may be deeper than Python's.

    An entry of the stack is still open: the token of a Repeat, or a bracket with its parts so far.
    """

    def __init__(self, line: str):
        self._line = line
        self._open: list[str | tuple[str, list[Plan]]] = []
        self._named: dict[str, Plan] = {}
        self._name = ""  # of the definition being read
        self._done: Plan | None = None

    def run(self) -> Plan:
        at = 0
        while at < len(self._line.rstrip()):
            match = _TOKEN.match(self._line, at)
            if match is None:
                raise self._error(at, "a number, x1, (, [, +, ;, ) or ]")
            self._token("".join(match[1].split()), at)
            at = match.end()
        if self._open or self._done is None or self._name:
            raise self._error(at, self._missing())
        return self._done

    def _missing(self) -> str:
        """The token expected next where the line ends too early."""
        if self._done is None:
            return "a part"
        if not self._open:
            return "; and a part"
        return "]" if self._open[-1] == ("[", []) else "+ or )"

    def _token(self, token: str, at: int) -> None:
        if token in "+;)]":
            self._after_part(token, at)
        elif self._done is not None:
            raise self._error(at, "+, ;, ) or ]")
        elif token in "([":
            self._open.append((token, []))
        elif token[-1] in "*@":
            if int(token[:-1]) == 0:
                raise self._error(at, "a count of at least 1")
            self._open.append(token)
        elif token.endswith("="):
            if self._open or self._name:
                raise self._error(at, "a part")
            self._name = token[:-1]
        elif token.isdigit():
            self._part(Steps(int(token)))
        elif token in self._named:
            self._part(self._named[token])
        else:
            raise self._error(at, f"a definition of {token} before its use")

    def _after_part(self, token: str, at: int) -> None:
        part, self._done = self._done, None
        if part is None:
            raise self._error(at, "a part")
        if token == ";":
            if self._open or not self._name:
                raise self._error(at, "the end")
            self._named[self._name], self._name = part, ""
            return
        opened = self._open[-1] if self._open else None
        if not isinstance(opened, tuple) or (opened[0], token) not in {("(", "+"), ("(", ")"), ("[", "]")}:
            raise self._error(at, "a bracket that this belongs to")
        opened[1].append(part)
        if token != "+":
            self._open.pop()
            self._part(Chain(tuple(opened[1])) if token == ")" else Remat(part))

    def _part(self, part: Plan) -> None:
        while self._open and isinstance(opened := self._open[-1], str):
            self._open.pop()
            part = Repeat(int(opened[:-1]), part, "device" if opened[-1] == _SIGNS["device"] else "host")
        self._done = part

    def _error(self, at: int, expected: str) -> ValueError:
        return ValueError(f"not the notation of a plan: {self._line!r} at character {at}: expected {expected}.")
