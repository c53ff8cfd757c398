"""Several layers under one budget: a stack of cells acting as one cell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from bptt_jax._jaxprs.types import Tree
from bptt_jax._recurrent.cells import checked_cells, with_any_input


class Stack(nnx.RNNCellBase):
    """Cells stacked to act as one cell: the y of each is the x of the next.

    `RNN(Stack(cells), budget=...)` runs all layers in one scan. No layer returns a sequence to the next, and one budget
    covers all of them.

    Args:
      cells: recurrent cells, the lowest first; at least one.

    Raises:
      TypeError, ValueError: if `cells` is anything else.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from bptt_jax.nnx import RNN
    >>> rngs = nnx.Rngs(0)
    >>> layers = RNN(Stack([nnx.LSTMCell(3, 8, rngs=rngs), nnx.GRUCell(8, 6, rngs=rngs)]), budget="40%")
    >>> layers(jnp.ones((2, 100, 3))).shape
    (2, 100, 6)
    """

    def __init__(self, cells: Iterable[Any]):
        self.cells = nnx.List(checked_cells(cells, nnx.Module))

    def __call__(self, carry: Tree, inputs: jax.Array) -> tuple[tuple[Any, ...], jax.Array]:
        """One step of all cells.

        Args:
          carry: a tuple, the carry of each cell.
          inputs: (*batch, *features).

        Returns:
          (the new carries, the y of the last cell).
        """
        carries = []
        for cell, own in zip(self.cells, carry, strict=True):
            new, inputs = cell(own, inputs)
            carries.append(new)
        return tuple(carries), inputs

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Tree = None
    ) -> tuple[Any, ...]:
        """The first carry of each cell, for the shape of the lowest cell's inputs; `carry_init` goes to each cell."""
        options = {} if carry_init is None else {"carry_init": carry_init}
        carries: list[Any] = []
        for i, cell in enumerate(self.cells):
            if i > 0:
                input_shape = _y_shape(self.cells[i - 1], carries[-1], input_shape)
            carries.append(cell.initialize_carry(input_shape, rngs, **options))
        return tuple(carries)

    @property
    def num_feature_axes(self) -> int:
        """Number of feature axes of the lowest cell's inputs."""
        return int(self.cells[0].num_feature_axes)


def _y_shape(cell: Any, carry: Tree, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a cell's y for inputs of `input_shape`, by abstract evaluation because cells do not state it.

    x has JAX's default float dtype, as when layers are initialised, or is of integers.
    """
    graphdef, state = nnx.split(cell)

    def y(state: Any, carry: Tree, x: jax.Array) -> Any:
        copied: Any = nnx.merge(graphdef, state)
        return copied(carry, x)[1]

    return tuple(with_any_input(lambda x: jax.eval_shape(y, state, carry, x), input_shape).shape)
