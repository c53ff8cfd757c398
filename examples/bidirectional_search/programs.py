"""Programs: expressions over the inputs of a task. They run on an example, print as s-expressions, are read back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.bidirectional_search.domain import Primitive


@dataclass(frozen=True)
class Input:
    index: int

    def __str__(self) -> str:
        return f"${self.index}"


@dataclass(frozen=True)
class Call:
    primitive: Primitive
    arguments: tuple["Expression", ...]

    def __str__(self) -> str:
        return f"({' '.join([self.primitive.name, *map(str, self.arguments)])})"


Expression = Input | Call


def calls(expression: Expression) -> set[Call]:
    """All different calls of a program."""
    match expression:
        case Call(_, arguments):
            return {expression}.union(*map(calls, arguments))
    return set()


def run(expression: Expression, inputs: Sequence[Any] | Mapping[int, Any]) -> Any:
    """The result on one example, or None where an operation is undefined."""
    match expression:
        case Input(index):
            return inputs[index]
        case Call(primitive, arguments):
            results = [run(argument, inputs) for argument in arguments]
            return None if any(result is None for result in results) else primitive.apply(*results)


def parse(text: str, primitives: Mapping[str, Primitive], variable: str = "$") -> Expression:
    """Reads what `str` of an expression prints; inputs are written with the prefix `variable`."""
    tokens = text.replace("(", " ( ").replace(")", " ) ").split()
    expression, rest = _parse(tokens, primitives, variable)
    if rest:
        raise ValueError(f"{text!r} goes on behind its end: {' '.join(rest)}")
    return expression


def _parse(
    tokens: Sequence[str], primitives: Mapping[str, Primitive], variable: str
) -> tuple[Expression, Sequence[str]]:
    first, rest = tokens[0], tokens[1:]
    if first.startswith(variable):
        return Input(int(first.removeprefix(variable))), rest
    if first != "(":
        raise ValueError(f"expected an input or a call, got {first!r}")
    name, rest = rest[0], rest[1:]
    if name not in primitives:
        raise ValueError(f"{name!r} is none of the operations {', '.join(primitives)}")
    arguments = []
    while rest[0] != ")":
        argument, rest = _parse(rest, primitives, variable)
        arguments.append(argument)
    if len(arguments) != primitives[name].arity:
        raise ValueError(f"{name} has {primitives[name].arity} arguments, got {len(arguments)}")
    return Call(primitives[name], tuple(arguments)), rest[1:]
