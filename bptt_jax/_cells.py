"""How a cell class is found once its name is bound to a layer class: pickle looks classes up by name."""

from __future__ import annotations

import sys
from typing import Any


def found_by_name(cls: type) -> Any:
    """What a class's module and qualified name lead to, as pickle would look it up; None if to nothing."""
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found


def hide_behind_layer(cell_class: type) -> None:
    """Renames a cell class that is being decorated: its own name is about to be bound to the layer."""
    if found_by_name(cell_class) is not cell_class:
        cell_class.__qualname__ = f"{cell_class.__qualname__}.cell_class"
