"""Layer classes made from Linen cell classes: dataclasses with the cell's fields, making the cell in `setup`."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import flax.linen as nn

from bptt_jax._caches import remember_for_good
from bptt_jax._recurrent.cells import hide_behind_layer


# One class per cell class and options, because an unpickled layer must have the class of the pickled one.
@remember_for_good
def layer_class(base: Any, cell_class: type[Any], options: Any, unroll_is_bool: bool) -> Any:
    """The class of layers running cells of `cell_class`.

    Args:
      base: its parent class, which runs `self.cell` with `self._options()`.
      cell_class: the class of the cell; its fields become the fields of the layer.
      options: hashable; the result of `_options`.
      unroll_is_bool: whether `unroll` is a bool. It is part of the cache's key, because `unroll=True` equals
        `unroll=1` there but means a complete unroll.

    Raises:
      TypeError: if the cell has a field "cell".
    """
    fields = [f for f in dataclasses.fields(cell_class) if f.init and f.name not in ("parent", "name")]
    if any(field.name == "cell" for field in fields):
        raise TypeError(f"{cell_class.__name__} has a field 'cell', the name that its layer gives to the cell.")

    def setup(self: Any) -> None:
        self.cell = cell_class(**{field.name: getattr(self, field.name) for field in fields})

    def reduce(self: Any) -> Any:
        # Defaults are left out, because pickle cannot name some of them (JAX's own activations).
        arguments = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) is not f.default}
        return _rebuild, (base, cell_class, options, unroll_is_bool, {**arguments, "name": self.name})

    def body(namespace: dict[str, Any]) -> None:
        namespace["__annotations__"] = {field.name: field.type for field in fields}
        for field in fields:
            namespace.update(_default(field))
        # As a decorator `rnn` binds the layer to the cell's name, so the layer takes the cell's docstring and path.
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
    """The namespace entry giving a field of the layer the default of the cell's field."""
    if field.default_factory is not dataclasses.MISSING:
        return {field.name: dataclasses.field(default_factory=field.default_factory, kw_only=bool(field.kw_only))}
    if field.default is not dataclasses.MISSING:
        return {field.name: dataclasses.field(default=field.default, kw_only=bool(field.kw_only))}
    return {field.name: dataclasses.field(kw_only=True)} if field.kw_only is True else {}


def _rebuild(base: Any, cell_class: type[Any], options: Any, unroll_is_bool: bool, arguments: dict[str, Any]) -> Any:
    return layer_class(base, cell_class, options, unroll_is_bool)(**arguments)
