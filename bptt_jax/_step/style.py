"""The ways in which a block can take its products, to choose from by bytes and time."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Style:
    """How a block takes its products.

    Attributes:
      merged: products that share an operand run as one, where that pays; for that, a copy of their weights is held.
      in_turn: the products at the end of a block run one after another, so that of their results only one exists at a
        time. It takes about a tenth more time.
    """

    merged: bool = True
    in_turn: bool = False
