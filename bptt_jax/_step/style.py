"""The styles in which a block can take its products, to choose from by bytes and time."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Style:
    """How a block takes its products.

    Attributes:
      merged: products with a common operand run as one, where that pays; a joined copy of their weights is held.
      in_turn: the products at the end of a block run one after another, so only one of their results exists at a
        time. This takes about a tenth more time.
      features: products of x evaluated for a block at once, where that pays; a block holds their results.
    """

    merged: bool = True
    in_turn: bool = False
    features: bool = True
