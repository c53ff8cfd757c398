"""A drawing of a solved search: nodes from the inputs on the left to the target on the right, edges named by operation.

Edges of the program are strong. What was found backward, from what was asked for, is drawn dashed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage, TextArea

from examples.bidirectional_search.domain import Value
from examples.bidirectional_search.domains.arc import ArcSymmetry
from examples.bidirectional_search.graph import Edge, Graph, Search
from examples.bidirectional_search.programs import Input

# ARC's colours, black first.
_CELLS = ["#000000", "#1e78d2", "#f93c31", "#4fcc30", "#ffdc00", "#999999", "#e53aa3", "#ff851b", "#87d8f1", "#921231"]
_INPUT, _MADE, _OPEN = "#1b9e77", "#66a61e", "#d95f02"
_MOST_PIXELS = 56  # of a grid's longer side


def draw(search: Search, path: Path) -> None:
    """One picture of the whole graph, in the format that the path's suffix names."""
    graph, grids = search.graph, isinstance(search.domain, ArcSymmetry)
    places = _places(graph)
    width, height = (1 + places[:, axis].max() for axis in (0, 1))
    figure = Figure(figsize=(1.9 * width + 0.6, 1.35 * height + 0.9), layout="constrained")
    axes = figure.add_subplot()
    program = _of_program(graph)
    for node, edges in enumerate(graph.edges):
        for edge in edges:
            _draw_edge(axes, places, node, edge, (node, edge) in program)
    for node, value in enumerate(graph.values):
        colour = _INPUT if isinstance(graph.origin[node], Input) else _MADE if graph.grounded(node) else _OPEN
        _draw_node(axes, places[node], value, colour, grids, 2.5 if node == graph.target else 1.2)
    axes.set(xlim=(-0.6, width - 0.4), ylim=(height - 0.4, -0.6))
    axes.set_axis_off()
    state = f"solved in {search.steps} steps" if search.solved else f"open after {search.steps} steps"
    title = f"{search.task.name}: {state}\n{search.program() if search.solved else ''}"
    axes.set_title(title, fontsize=9, parse_math=False)  # inputs are $0, $1
    figure.savefig(path, dpi=150)


def _places(graph: Graph) -> np.ndarray:
    """(nodes, 2): a column for each node behind all that it is made of, the target in the last; rows within columns."""
    column = [0] * len(graph.values)
    for _ in graph.values:  # edges have no cycles that matter: a column is the length of the first way to a node
        for node, origin in enumerate(graph.origin):
            if isinstance(origin, Edge):
                column[node] = 1 + max(column[argument] for argument in origin.arguments)
    last = max(column)
    column = [at if graph.grounded(node) else last - 0.5 for node, at in enumerate(column)]
    column[graph.target] = last
    rows: dict[float, int] = {}
    places = np.zeros((len(column), 2))
    for node, at in enumerate(column):
        places[node] = at, rows.setdefault(at, 0)
        rows[at] += 1
    tallest = max(rows.values())
    for node, at in enumerate(column):
        places[node, 1] += 0.5 * (tallest - rows[at])
    return places


def _of_program(graph: Graph) -> set[tuple[int, Edge]]:
    """The edges that the target's program takes."""
    found, waiting = set(), [graph.target]
    while waiting:
        node = waiting.pop()
        origin = graph.origin[node]
        if isinstance(origin, Edge):
            found.add((node, origin))
            waiting += origin.arguments
    return found


def _draw_edge(axes: Axes, places: np.ndarray, node: int, edge: Edge, strong: bool) -> None:
    colour, end = "#333333" if strong else "#bbbbbb", places[node]
    for argument in dict.fromkeys(edge.arguments):
        arrow = {"arrowstyle": "-|>", "color": colour, "linestyle": "--" if edge.backward else "-", "shrinkA": 30}
        arrow |= {"shrinkB": 30, "linewidth": 1.4 if strong else 0.8, "connectionstyle": "arc3,rad=0.08"}
        axes.annotate("", end, places[argument], arrowprops=arrow)
    # Nearer to the result, where the edges of several arguments come together.
    name = 0.65 * end + 0.35 * places[list(edge.arguments)].mean(0)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    axes.text(*name, edge.primitive.name, fontsize=9, color=colour, ha="center", va="center", bbox=box, zorder=5)


def _draw_node(axes: Axes, place: Sequence[float], value: Value, colour: str, grids: bool, line: float) -> None:
    """Grids by the picture of their first example, all else as text."""
    content: Any = TextArea(", ".join(map(str, value)), textprops={"fontsize": 10})
    if grids:
        cells = np.array([list(row) for row in value[0]])
        image = ListedColormap(_CELLS)(cells / 9.0)
        content = OffsetImage(image, zoom=_MOST_PIXELS / max(cells.shape), interpolation="nearest")
    box = AnnotationBbox(content, tuple(place), pad=0.25, bboxprops={"edgecolor": colour, "linewidth": line})
    axes.add_artist(box)
