"""Grids of ten colours, and the primitives on them. A grid is a tuple of rows, each of them bytes: hashed quickly."""

from typing import Any

from examples.bidirectional_search.domain import Primitive

Grid = tuple[bytes, ...]
LARGEST = 30  # the longest side of a grid in ARC


def grid(rows: Any) -> Grid:
    """From nested sequences or an array."""
    return tuple(bytes(int(cell) for cell in row) for row in rows)


def vertical_flip(cells: Grid) -> Grid:
    """The top row comes last."""
    return cells[::-1]


def horizontal_flip(cells: Grid) -> Grid:
    """The leftmost column comes last."""
    return tuple(row[::-1] for row in cells)


def rotate_clockwise(cells: Grid) -> Grid:
    return tuple(map(bytes, zip(*cells[::-1], strict=True)))


def rotate_counterclockwise(cells: Grid) -> Grid:
    return tuple(map(bytes, zip(*cells, strict=True)))[::-1]


def left_half(cells: Grid) -> Grid | None:
    """Columns left of the middle; the middle one itself, if there is one, is left out."""
    width = len(cells[0]) // 2
    return tuple(row[:width] for row in cells) if width else None


def overlay(upper: Grid, lower: Grid) -> Grid | None:
    """Cells of the lower grid where the upper one is black (0)."""
    if len(upper) != len(lower) or len(upper[0]) != len(lower[0]):
        return None
    return tuple(bytes(a or b for a, b in zip(*rows, strict=True)) for rows in zip(upper, lower, strict=True))


def search_primitives(largest: int = LARGEST) -> tuple[Primitive, ...]:
    """What the search has: stacking either way with both conditional inverses, rotations and flips with their inverses.

    Six primitives make 14 operations. Grids with a side longer than `largest` are undefined.
    """
    return (
        _stack("hstack", largest, sideways=True),
        _stack("vstack", largest, sideways=False),
        Primitive("rotate_cw", 1, rotate_clockwise, (rotate_counterclockwise,)),
        Primitive("rotate_ccw", 1, rotate_counterclockwise, (rotate_clockwise,)),
        Primitive("flip_v", 1, vertical_flip, (vertical_flip,)),
        Primitive("flip_h", 1, horizontal_flip, (horizontal_flip,)),
    )


def abstraction_primitives() -> tuple[Primitive, ...]:
    """What abstractions are made of: flip, rotate, overlay, stack, left half."""
    flip, rotate, stack = (search_primitives()[index] for index in (4, 2, 1))
    return (flip, rotate, Primitive("overlay", 2, overlay), stack, Primitive("left_half", 1, left_half))


def _stack(name: str, largest: int, *, sideways: bool) -> Primitive:
    def down(upper: Grid, lower: Grid) -> Grid | None:
        return upper + lower if len(upper[0]) == len(lower[0]) and len(upper) + len(lower) <= largest else None

    def right(first: Grid, second: Grid) -> Grid | None:
        if len(first) != len(second) or len(first[0]) + len(second[0]) > largest:
            return None
        return tuple(a + b for a, b in zip(first, second, strict=True))

    def upper_of(result: Grid, lower: Grid) -> Grid | None:
        return result[: -len(lower)] or None

    def lower_of(result: Grid, upper: Grid) -> Grid | None:
        return result[len(upper) :] or None

    def left_of(result: Grid, second: Grid) -> Grid | None:
        width = len(result[0]) - len(second[0])
        return tuple(row[:width] for row in result) if width > 0 else None

    def right_of(result: Grid, first: Grid) -> Grid | None:
        width = len(first[0])
        return tuple(row[width:] for row in result) if width < len(result[0]) else None

    return (
        Primitive(name, 2, right, (left_of, right_of)) if sideways else Primitive(name, 2, down, (upper_of, lower_of))
    )
