"""Recurrent cells of Linen and NNX: checks of them, and their path once their name is bound to a layer class."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax._jaxprs.types import Leaf, Tree
from bptt_jax.errors import BudgetError


def found_by_name(cls: type) -> Any:
    """The object at a class's module and qualified name, looked up as by pickle; None if there is none."""
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found


def hide_behind_layer(cell_class: type) -> None:
    """Renames a cell class being decorated, because its own name is about to be bound to the layer."""
    # A class found by its name is not being defined, as in `rnn(...)(nn.LSTMCell)`; it keeps its name.
    if found_by_name(cell_class) is not cell_class:
        cell_class.__qualname__ = f"{cell_class.__qualname__}.cell_class"


def check_cell(cell: Any, what: str, module: type) -> None:
    """Raises unless `cell`, a module or a class of modules, is a recurrent cell.

    Args:
      cell: any value.
      what: its name in the message.
      module: the base class of the library's modules.
    """
    is_class = isinstance(cell, type)
    owner = cell if is_class else type(cell)
    wanted = ("initialize_carry", "num_feature_axes")
    own = () if is_class else getattr(cell, "__dict__", ())
    missing = [name for name in wanted if not (hasattr(owner, name) or name in own)]
    if issubclass(owner, module) and not missing:
        return
    library = _library(module)
    name = f"the class {cell.__name__}" if is_class else "None" if cell is None else f"an instance of {owner.__name__}"
    no_module = f"which is no {library} module"
    found = f"which has no {' and no '.join(missing)}" if issubclass(owner, module) else no_module
    # Only Flax's own cells tell their library by their module; a user's cell may be of either.
    own_library = _library(owner)
    is_flax = own_library in ("flax.linen", "flax.nnx") and own_library != library
    other = f" It is of {own_library}, for which there is bptt_jax.{own_library[5:]}." if is_flax else ""
    raise TypeError(
        f"{what} must be a recurrent cell such as {library}.LSTMCell or a subclass of {library}.RNNCellBase, "
        f"got {name}, {found}.{other}"
    )


def _library(cls: type) -> str:
    return ".".join(cls.__module__.split(".")[:2])


def other_library(value: Any, module: type) -> str | None:
    """The library of Flax, "flax.linen" or "flax.nnx", whose module `value` is, unless it is the one of `module`."""
    found = {_library(base) for base in type(value).__mro__} & {"flax.linen", "flax.nnx"}
    return None if isinstance(value, module) or not found else found.pop()


def checked_cells(cells: Iterable[Any], module: type) -> tuple[Any, ...]:
    """The cells of a stack, the lowest first; raises if there are none or one is no recurrent cell."""
    if isinstance(cells, module):
        raise TypeError(f"a Stack takes a sequence of cells, got one {type(cells).__name__}; put it into a list.")
    found = tuple(cells)
    if not found:
        raise ValueError("a Stack needs at least one cell, got none.")
    for i, cell in enumerate(found):
        if isinstance(cell, type):
            raise TypeError(f"cell {i} of a Stack is the class {cell.__name__}; give an instance of it.")
        check_cell(cell, f"cell {i} of a Stack", module)
    return found


@contextlib.contextmanager
def explaining_carry(carry: Tree, expected: Callable[[], Tree]) -> Iterator[None]:
    """Names a first carry that does not fit, where a cell fails with it: the error alone is from inside of the cell.

    Args:
      carry: as given by the user; None if it is the cell's own.
      expected: makes the cell's own.

    Raises:
      TypeError: for an error within, if the carry is not as expected.
    """
    try:
        yield
    except BudgetError:
        raise
    except Exception as error:
        if carry is None:
            raise
        try:
            wanted = jax.eval_shape(expected)
        except Exception:  # a cell need not make carries; its own error is the better one then
            raise error from None
        if _shapes(carry) == _shapes(wanted):
            raise
        found = f"initial_carry is {_types(carry)}, and the cell's own is {_types(wanted)}"
        raise TypeError(f"{found}: give one of the same structure and shapes.") from error


def _shapes(tree: Tree) -> tuple[Any, list[Any]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [getattr(leaf, "shape", None) for leaf in leaves]


def _types(tree: Tree) -> str:
    """A pytree with types for its arrays, for example "(float32[2,8], float32[2,8])"."""

    def type_of(leaf: Any) -> str:
        shape = getattr(leaf, "shape", None)
        return repr(leaf) if shape is None else f"{leaf.dtype}[{','.join(map(str, shape))}]"

    return str(jax.tree.map(type_of, tree)).replace("'", "")


def full_name(value: Leaf) -> str:
    """Name of a value's class with its package, for example "flax's LSTMCell"."""
    return f"{type(value).__module__.split('.')[0]}'s {type(value).__name__}"


def with_any_input(run: Callable[[Any], Any], shape: tuple[int, ...]) -> Any:
    """`run` of an x of a shape: of floats or, where it refuses these as embeddings do, of integers."""
    try:
        return run(jnp.zeros(shape))
    except (TypeError, ValueError) as refusal:
        try:
            return run(jnp.zeros(shape, jnp.int32))
        except (TypeError, ValueError):
            raise refusal from None
