"""Layer classes made from NNX cell classes: constructed with the cell's arguments, they make the cell."""

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
    """Metaclass of layer classes. Pickle calls `_reduce` for it, because some of them cannot be found by name."""


# One class per cell class and options, because an unpickled layer must have the class of the pickled one.
@remember_for_good
def layer_class(base: Any, cell_class: type[Any], options: Any, rngs: bool, unroll_is_bool: bool) -> Any:
    """The class of layers running cells of `cell_class`.

    Args:
      base: its parent class, constructed with (cell, options, rngs).
      cell_class: the class of the cell; its constructor's arguments become the layer's.
      options: hashable.
      rngs: whether the layer has keys for first carries.
      unroll_is_bool: whether `unroll` is a bool. It is part of the cache's key, because `unroll=True` equals
        `unroll=1` there but means a complete unroll.
    """

    @functools.wraps(cell_class.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, cell_class(*args, **kwargs), options, rngs)

    def body(namespace: dict[str, Any]) -> None:
        namespace["__init__"] = init
        # As a decorator `rnn` binds the layer to the cell's name, so the layer takes the cell's docstring and path.
        namespace["__doc__"] = cell_class.__doc__
        namespace["__module__"] = cell_class.__module__
        namespace["__qualname__"] = cell_class.__qualname__
        namespace["cell_class"] = cell_class
        namespace["_made_of"] = (base, cell_class, options, rngs, unroll_is_bool)

    layer = types.new_class(cell_class.__name__, (base,), {"metaclass": LayerType}, body)
    hide_behind_layer(cell_class)
    return layer


def _reduce(layer: Any) -> Any:
    """The pickled form of a layer class: its name if the class is found by it, else the arguments of `layer_class`."""
    # Subclasses of a layer class have no `_made_of` of their own; pickle treats them like any other class.
    if found_by_name(layer) is layer or "_made_of" not in vars(layer):
        return layer.__qualname__
    return layer_class, layer._made_of


copyreg.pickle(LayerType, _reduce)
