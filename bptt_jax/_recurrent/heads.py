"""Heads of recurrent layers: a module or a function, applied to the output of each step inside the scan.

A head takes a cell's output y, or y and an input of its own for the step, such as the target of a loss. Its results are
stacked over time in place of y, so values between y and them, such as logits, exist for a few steps at a time.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax._jaxprs.types import Leaf, Tree
from bptt_jax._recurrent.cells import full_name, other_library


def check_head(head: Any, module: type) -> None:
    """Raises TypeError unless `head` is None, a module or a function.

    Args:
      head: any value.
      module: the base class of the library's modules.
    """
    library = ".".join(module.__module__.split(".")[:2])
    if isinstance(head, type):
        raise TypeError(f"RNN's head must be a module or a function, got the class {head.__name__}; give an instance.")
    if other := other_library(head, module):
        raise TypeError(
            f"RNN's head must be a {library} module or a function, got {full_name(head)} of {other}, for which there "
            f"is bptt_jax.{other[5:]}."
        )
    if head is not None and not callable(head):
        raise TypeError(
            f"RNN's head must be a {library} module or a function of each step's output, got {head!r}, which cannot be "
            "called."
        )


def refuse_hidden_modules(head: Any, is_hidden: Callable[[Any], bool]) -> None:
    """Raises TypeError for a function that itself reads modules: the layer would not know of their variables.

    Args:
      head: a function, not a module.
      is_hidden: whether a value is a module with variables.
    """
    values = jax.tree.leaves(list(_read_by(head)), is_leaf=is_hidden)
    hidden = next(filter(is_hidden, values), None)
    if hidden is not None:
        raise TypeError(
            f"RNN's head is a function that reads the module {type(hidden).__name__}, of whose variables the layer "
            "would not know. Make the head a module with the modules it calls; a function reads arrays and options."
        )


def _read_by(function: Any) -> Iterator[Any]:
    """The values that a function itself reads beside its arguments, as far as Python tells."""
    while isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.values())
        function = function.func
    yield getattr(function, "__self__", None)
    function = inspect.unwrap(getattr(function, "__func__", function))
    if inspect.isfunction(function):
        used = set(_globals_of(function.__code__))
        yield from (value for name, value in function.__globals__.items() if name in used)
        yield from function.__defaults__ or ()
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # nothing has been put into it yet
                yield cell.cell_contents


def _globals_of(code: types.CodeType) -> Iterator[str]:
    """The names of globals that a function's code reads, with those of functions within it."""
    yield from (one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)


def check_head_inputs(head: Any, head_inputs: Tree, batch: tuple[int, ...], steps: int, time_major: bool) -> None:
    """Raises for inputs of a head which do not fit it, or the inputs of the layer.

    Args:
      head: the head; None if there is none.
      head_inputs: a pytree of arrays (*batch, time, ...), or (time, *batch, ...) if `time_major`; None: not given.
      batch, steps: the batch sizes and the number of steps of the layer's inputs.
      time_major: the order of the axes.

    Raises:
      TypeError: for inputs without a head, for a head of other arguments, and for leaves that are no arrays.
      ValueError: for arrays of another shape.
    """
    if head is None:
        if head_inputs is not None:
            raise TypeError("head_inputs are for a layer with a head, and this one has none: RNN(cell, head=...).")
        return
    _check_takes(head, head_inputs is not None)
    order = "(time, *batch, ...)" if time_major else "(*batch, time, ...)"
    wanted = (steps, *batch) if time_major else (*batch, steps)
    for path, leaf in jax.tree_util.tree_leaves_with_path(head_inputs):
        name = "head_inputs" + jax.tree_util.keystr(path)
        if not hasattr(leaf, "shape"):
            raise TypeError(f"{name} must be an array {order}, got {leaf!r}.")
        if leaf.shape[: len(wanted)] != wanted:
            raise ValueError(
                f"{name} must have the axes of the inputs, {order}, so a shape that begins with {wanted}, got "
                f"{leaf.shape}."
            )


def _check_takes(head: Any, has_input: bool) -> None:
    try:
        signature = inspect.signature(head)
    except (TypeError, ValueError):  # some callables do not tell
        return
    if _binds(signature, 2 if has_input else 1):
        return
    name = f"{getattr(head, '__name__', type(head).__name__)}({', '.join(signature.parameters)})"
    if has_input and _binds(signature, 1):
        raise TypeError(f"the head {name} takes the output alone, and the call has head_inputs for it.")
    if not has_input and _binds(signature, 2):
        raise TypeError(f"the head {name} needs an input for each step; call the layer with head_inputs=.")
    given = "head(y, head_input)" if has_input else "head(y)"
    raise TypeError(f"the head {name} cannot be called as {given}.")


def _binds(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def arguments_of(y: Tree, head_input: Tree) -> tuple[Any, ...]:
    """The arguments of a head at one step."""
    return (y,) if head_input is None else (y, head_input)


def first_step(sequences: Tree, time_axis: int) -> Any:
    """The first step of sequences, of each leaf; zeros for sequences of no steps."""

    def first(leaf: Leaf) -> Any:
        if leaf.shape[time_axis] > 0:
            return jnp.take(leaf, 0, time_axis)
        return jnp.zeros(leaf.shape[:time_axis] + leaf.shape[time_axis + 1 :], leaf.dtype)

    return jax.tree.map(first, sequences)


def check_outputs(outputs: Tree, batch: tuple[int, ...], time_axis: int, by_sequence: bool) -> None:
    """Raises for outputs of a step without the axes that their stack needs.

    Args:
      outputs: of all steps, time first.
      batch: the batch sizes.
      time_axis: the axis of time in their stack.
      by_sequence: whether each sequence has an order of its own.

    Raises:
      ValueError: if axes are missing.
    """
    for leaf in jax.tree.leaves(outputs):
        shape = jnp.shape(leaf)[1:]
        if len(shape) < time_axis or (by_sequence and shape[: len(batch)] != batch):
            instead = "reverse without keep_order" if by_sequence else "time_major=True"
            raise ValueError(
                f"each output of a step needs the batch's axes, {batch}, first, to be stacked along axis {time_axis}; "
                f"got one of shape {shape}. With {instead} it needs none."
            )
