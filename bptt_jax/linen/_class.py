"""From a Linen cell class to a layer class: a dataclass with the cell's fields that makes the cell in its setup."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import flax.linen as nn

from bptt_jax._caches import remember_for_good
from bptt_jax._recurrent.cells import hide_behind_layer


# One class per cell class and options, so that an unpickled layer is of the class of the pickled one.
@remember_for_good
def layer_class(base: Any, cell_class: type[Any], options: Any, unroll_is_bool: bool) -> Any:
    """The class of layers that run cells of `cell_class`.

    Args:
      base: the class of layers, which runs `self.cell` with `self._options()`.
      cell_class: the cell; its fields become the fields of the layer.
      options: hashable; what `_options` returns.
      unroll_is_bool: part of the identity of the options, in which True equals 1 and means something else.
    """
    fields = [f for f in dataclasses.fields(cell_class) if f.init and f.name not in ("parent", "name")]
    if any(field.name == "cell" for field in fields):
        raise TypeError(f"{cell_class.__name__} has a field 'cell', the name that its layer gives to the cell.")

    def setup(self: Any) -> None:
        self.cell = cell_class(**{field.name: getattr(self, field.name) for field in fields})

    def reduce(self: Any) -> Any:
        # Only what differs from the defaults, some of which (JAX's own activations) pickle cannot name.
        arguments = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) is not f.default}
        return _rebuild, (base, cell_class, options, unroll_is_bool, {**arguments, "name": self.name})

    def body(namespace: dict[str, Any]) -> None:
        namespace["__annotations__"] = {field.name: field.type for field in fields}
        for field in fields:
            namespace.update(_default(field))
        namespace["__doc__"] = cell_class.__doc__
        namespace["__module__"] = cell_class.__module__
        namespace["__qualname__"] = cell_class.__qualname__
        namespace["__reduce__"] = nn.nowrap(reduce)
        namespace["cell_class"] = cell_class
        namespace["setup"] = setup
        namespace["_options"] = nn.nowrap(lambda self: options)

    layer = types.new_class(cell_class.__name__, (base,), exec_body=body)
    hide_behind_layer(cell_class)
    return layer


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """The namespace entry that gives a layer's field the default of the cell's."""
    if field.default_factory is not dataclasses.MISSING:
        return {field.name: dataclasses.field(default_factory=field.default_factory, kw_only=bool(field.kw_only))}
    if field.default is not dataclasses.MISSING:
        return {field.name: dataclasses.field(default=field.default, kw_only=bool(field.kw_only))}
    return {field.name: dataclasses.field(kw_only=True)} if field.kw_only is True else {}


def _rebuild(base: Any, cell_class: type[Any], options: Any, unroll_is_bool: bool, arguments: dict[str, Any]) -> Any:
    return layer_class(base, cell_class, options, unroll_is_bool)(**arguments)
