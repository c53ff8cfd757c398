"""Several layers under one budget: a stack of cells acting as one cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from bptt_jax._jaxprs.types import Tree
from bptt_jax._recurrent.cells import checked_cells, with_any_input


class Stack(nn.RNNCellBase):
    """Cells stacked to act as one cell: the y of each is the x of the next.

    `RNN(Stack(cells), budget=...)` runs all layers in one scan. No layer returns a sequence to the next, and one budget
    covers all of them. The cells belong to the stack: their parameters are under "cells_0", "cells_1" and so on.

    Attributes:
      cells: recurrent cells, the lowest first; at least one.

    Raises:
      TypeError, ValueError: if `cells` is anything else.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from bptt_jax.linen import RNN
    >>> layers = RNN(Stack([nn.LSTMCell(8), nn.GRUCell(6)]), budget="40%")
    >>> variables = layers.init(jax.random.key(0), jnp.ones((2, 100, 3)))
    >>> sorted(variables["params"]["cell"])
    ['cells_0', 'cells_1']
    >>> layers.apply(variables, jnp.ones((2, 100, 3))).shape
    (2, 100, 6)
    """

    cells: Sequence[nn.RNNCellBase]

    def __post_init__(self) -> None:
        cells = checked_cells(self.cells, nn.Module)
        # Cells made within the `__call__` of another module belong to it; copies without a parent can be the stack's.
        own = (cell if cell.parent is None or cell.parent is self else cell.copy(parent=None) for cell in cells)
        self.cells = tuple(own)
        super().__post_init__()

    def __call__(self, carry: Tree, x: jax.Array) -> tuple[tuple[Any, ...], jax.Array]:
        """One step of all cells.

        Args:
          carry: a tuple, the carry of each cell.
          x: (*batch, *features).

        Returns:
          (the new carries, the y of the last cell).
        """
        carries = []
        for cell, own in zip(self.cells, carry, strict=True):
            new, x = cell(own, x)
            carries.append(new)
        return tuple(carries), x

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[Any, ...]:
        """The first carry of each cell; `input_shape` is the shape of the lowest cell's x."""
        carries: list[Any] = []
        for i, key in enumerate(jax.random.split(rng, len(self.cells))):
            if i > 0:
                input_shape = _y_shape(self.cells[i - 1], carries[-1], input_shape)
            carries.append(self.cells[i].initialize_carry(key, input_shape))
        return tuple(carries)

    @property
    def num_feature_axes(self) -> int:
        """Number of feature axes of the lowest cell's x."""
        return int(self.cells[0].num_feature_axes)


def _y_shape(cell: nn.RNNCellBase, carry: Tree, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a cell's y for an x of `input_shape`, by abstract evaluation because cells do not state it.

    x has JAX's default float dtype, as when layers are initialised, or is of integers.
    """
    alone = cell.copy(parent=None, name=None)

    def outputs(x: jax.Array) -> Any:
        return jax.eval_shape(lambda: alone.init_with_output(jax.random.key(0), carry, x)[0])

    return tuple(with_any_input(outputs, input_shape)[1].shape)
