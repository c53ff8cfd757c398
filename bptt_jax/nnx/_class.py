"""From an NNX cell class to a layer class: one with the cell's constructor arguments, that makes the cell."""

from __future__ import annotations

import copyreg
import functools
import types
from typing import Any

from flax import nnx

from bptt_jax._caches import remember_for_good
from bptt_jax._recurrent.cells import found_by_name, hide_behind_layer

_ModuleType: Any = type(nnx.Module)


class LayerType(_ModuleType):
    """The type of layer classes, by which pickle knows those that no name leads to."""


# One class per cell class and options, so that an unpickled layer is of the class of the pickled one.
@remember_for_good
def layer_class(base: Any, cell_class: type[Any], options: Any, rngs: bool, unroll_is_bool: bool) -> Any:
    """The class of layers that run cells of `cell_class`.

    Args:
      base: the class of layers, constructed with (cell, options, rngs).
      cell_class: the cell; its constructor's arguments become those of the layer.
      options: hashable.
      rngs: whether the layer has keys for first carries.
      unroll_is_bool: part of the identity of the options, in which True equals 1 and means something else.
    """

    @functools.wraps(cell_class.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, cell_class(*args, **kwargs), options, rngs)

    def body(namespace: dict[str, Any]) -> None:
        namespace["__init__"] = init
        namespace["__doc__"] = cell_class.__doc__
        namespace["__module__"] = cell_class.__module__
        namespace["__qualname__"] = cell_class.__qualname__
        namespace["cell_class"] = cell_class
        namespace["_made_of"] = (base, cell_class, options, rngs, unroll_is_bool)

    layer = types.new_class(cell_class.__name__, (base,), {"metaclass": LayerType}, body)
    hide_behind_layer(cell_class)
    return layer


def _reduce(layer: Any) -> Any:
    """What pickle puts down for a layer class: its name, if that leads to it, else what it was made of."""
    if found_by_name(layer) is layer or "_made_of" not in vars(layer):
        return layer.__qualname__
    return layer_class, layer._made_of


copyreg.pickle(LayerType, _reduce)
