"""The scan of a recurrent layer: time axes, directions, sequences of several lengths, resets.

Linen's and NNX's layers hand in a cell as a pure step and get back a `Recurrence`: the arguments of a scan. This scan
reads and writes sequences along their own time axes, because copies with time first would take as many bytes again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from bptt_jax._budget import Budget
from bptt_jax._explain.explain import explain_along
from bptt_jax._explain.report import Report
from bptt_jax._jaxprs.types import Leaf, Tree
from bptt_jax._options import check_flags, check_options, checked_options
from bptt_jax._recurrent.heads import check_outputs
from bptt_jax._scan import scan_along
from bptt_jax._trace.along import Along, Layout
from bptt_jax.plans._nodes import Plan
from bptt_jax.plans._profile import Lowering

SCAN_OPTIONS = ("budget", "host_budget", "plan", "lowering", "verify", "unroll", "progress")  # of a layer, for its scan
_FLAGS = ("return_carry", "time_major", "reverse", "keep_order")
_SEQUENCES = ("seq_lengths", "resets", "head_inputs")
CALL_OPTIONS = (*_SEQUENCES, *_FLAGS)  # of a layer's call, beside inputs, first carry and keys
# (carry, variables, x, given) -> (carry, variables, y, made)
Step = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any, Any]]


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """Options of every recurrent layer: the ones of `bptt_jax.scan`, and the ones of Flax's layers for sequences."""

    budget: Budget = None
    plan: Plan | str | None = None
    lowering: Lowering | None = None
    verify: bool = True
    unroll: int | bool | None = None
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    host_budget: Budget = None
    progress: str | bool | None = None

    def __post_init__(self) -> None:
        check_options(
            self.budget,
            self.plan,
            self.lowering,
            self.verify,
            host_budget=self.host_budget,
            progress=self.progress,
        )
        check_flags({name: getattr(self, name) for name in _FLAGS})


@dataclasses.dataclass(frozen=True)
class Call:
    """Options of one call of a layer, under Flax's names.

    Attributes:
      time_major, return_carry, reverse, keep_order: as in `flax.linen.RNN`.
      seq_lengths: None, or integers (*batch).
      resets: None, or booleans (*batch, time), (time, *batch) if `time_major`. Before the steps marked True the carry
        is set back to the cell's own first one.
      head_inputs: None, or a pytree of arrays with the axes of resets first: the head's input at each step.
    """

    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    seq_lengths: Any = None
    resets: Any = None
    head_inputs: Any = None

    def time_axis(self, batch: tuple[int, ...]) -> int:
        """The axis of time in inputs with these batch sizes."""
        return 0 if self.time_major else len(batch)

    def __post_init__(self) -> None:
        check_flags({name: getattr(self, name) for name in _FLAGS})


def split_call(given: Mapping[str, Any], *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a call as (arrays, flags); `more` are the names of arrays only one kind of layer takes.

    Raises:
      TypeError: for an unknown name.
    """
    arrays = ("initial_carry", *_SEQUENCES, *more)
    unknown = [name for name in given if name not in (*arrays, *_FLAGS)]
    if unknown:
        known = ", ".join([*arrays, *_FLAGS])
        raise TypeError(f"explain got {unknown[0]!r}, which calling a layer does not take; it takes {known}.")
    names = [name for name in given if name in arrays]
    return {name: given[name] for name in names}, {name: given[name] for name in given if name not in names}


class PureCell(Protocol):
    """A cell as a pure step.

    Attributes:
      step: (carry, carried, x, given) -> (carry, carried, y, made). Beside x and y, each step gets the pytree `given`
        and returns the pytree `made`: its own keys and variables.
      carried: a pytree handed from step to step beside the carry, of any shapes. All sequences share it, so neither
        their lengths nor resets touch it.
      given: the pytrees of all steps, stacked over time in the order in which the cell runs.
      given_axes: the time axes of `given`: an int, or a pytree of ints which is a tree prefix of `given`.
      made_axes: function from `made` to the axes for stacking it, likewise.
    """

    @property
    def step(self) -> Step: ...
    @property
    def carried(self) -> Any: ...
    @property
    def given(self) -> Any: ...
    @property
    def given_axes(self) -> Any: ...
    @property
    def made_axes(self) -> Callable[[Any], Any]: ...


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """The arguments of a scan.

    Attributes:
      step, init, xs, reverse: as in `jax.lax.scan`, except for the time axes.
      layout: the time axes of xs and ys, and the lengths of sequences read from their ends.
      has_last: whether the carry returned is the one after each sequence's own last step.
    """

    step: Callable[[Any, Any], tuple[Any, Any]]
    init: Any
    xs: Any
    reverse: bool
    layout: Layout
    has_last: bool

    def run(self, unroll: int | bool | None, **options: Any) -> tuple[Any, Any, Any, Any]:
        """Runs the scan and returns (carry, last `carried`, outputs, stacked `made`)."""
        (carry, carried, last), (outputs, made) = scan_along(*self._arguments(unroll, options))
        return last if self.has_last else carry, carried, outputs, made

    def report(self, unroll: int | bool | None, **options: Any) -> Report:
        """The report of `bptt_jax.explain` on `run`."""
        return explain_along(*self._arguments(unroll, options))

    def _arguments(self, unroll: int | bool | None, options: dict[str, Any]) -> tuple[Any, ...]:
        return self.step, self.init, self.xs, None, self.reverse, unroll, checked_options(**options), self.layout


def require_array(inputs: Any) -> None:
    """Raises TypeError for inputs that are no array and no type of one, such as a bare shape."""
    if not (hasattr(inputs, "ndim") and hasattr(inputs, "dtype")):
        is_shape = isinstance(inputs, tuple | list) and all(isinstance(size, int) for size in inputs)
        meant = f" Did you mean jax.ShapeDtypeStruct({tuple(inputs)}, jnp.float32)?" if is_shape else ""
        raise TypeError(f"inputs must be an array or a jax.ShapeDtypeStruct, got {inputs!r}.{meant}")


def batch_shape(inputs: jax.Array, feature_axes: int, time_major: bool) -> tuple[int, ...]:
    """The batch sizes of inputs (*batch, time, *features), or (time, *batch, *features) if `time_major`.

    Raises:
      ValueError: for inputs without an axis of time.
    """
    last = inputs.ndim - feature_axes
    if last < 1:
        layout = "(time, *batch, *features)" if time_major else "(*batch, time, *features)"
        raise ValueError(
            f"inputs of shape {inputs.shape} have no axis of time: num_feature_axes of the cell is {feature_axes}, and "
            f"inputs are {layout}."
        )
    return inputs.shape[1:last] if time_major else inputs.shape[: last - 1]


def recurrence(
    cell: PureCell, carry: Tree, inputs: Tree, batch: tuple[int, ...], call: Call, fresh: Leaf
) -> Recurrence:
    """The scan running a cell over `inputs`, read along their own time axis.

    Args:
      cell: the cell.
      carry: the first carry. Where sequences have lengths or resets, its leaves have the batch sizes first.
      inputs: (*batch, time, ...), or (time, *batch, ...), of each leaf.
      batch: the batch sizes.
      call: the options.
      fresh: the carry after a reset.

    Raises:
      TypeError, ValueError: for lengths or resets of another type or shape.
    """
    time_axis = call.time_axis(batch)
    steps = jax.tree.leaves(inputs)[0].shape[time_axis]
    lengths, resets = _checked_lengths(call.seq_lengths, batch), _checked_resets(call, batch, steps)
    last_step = _last_step(lengths, steps) if call.return_carry and lengths is not None else None
    if last_step is not None or resets is not None:
        _check_carry(carry, batch, "resets" if resets is not None else "seq_lengths with return_carry")
    # Without lengths the scan itself goes backwards. With them it goes forwards and reads each sequence from its own
    # end, because padding stays behind the steps.
    backwards, flips = call.reverse and lengths is None, call.reverse and lengths is not None
    own = tuple(i + call.time_major for i in range(len(batch))) if flips else None
    of_inputs = Along(time_axis, batch_axes=own)
    # As in Flax, reversed outputs are in the order of the steps run, unless `keep_order` asks for the order of inputs.
    of_outputs = of_inputs if call.keep_order else Along(time_axis, flipped=backwards)

    def in_order_of_steps(axes: Any) -> Any:
        # Flipped where the scan goes backwards, because these arrays begin with the step run first.
        return jax.tree.map(lambda axis: Along(axis, flipped=backwards), axes)

    def of_ys(ys: Tree) -> Any:
        outputs, made = ys
        check_outputs(outputs, batch, time_axis, of_outputs.batch_axes is not None)
        return of_outputs, in_order_of_steps(cell.made_axes(made))

    return Recurrence(
        step=_scanned(cell.step, fresh, last_step),
        init=(carry, cell.carried, None if last_step is None else carry),
        xs=(inputs, cell.given, resets, None if last_step is None else jnp.arange(steps, dtype=jnp.int32)),
        reverse=backwards,
        layout=Layout(
            xs=(of_inputs, in_order_of_steps(cell.given_axes), of_inputs, 0),
            ys=of_ys,
            lengths=lengths if flips else None,
        ),
        has_last=last_step is not None,
    )


def _scanned(step: Step, fresh: Leaf, last_step: jax.Array | None) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The body of the scan. Its carry has a third part, the carry after the last step of each sequence: selected in the
    loop, never stacked. Parts not asked for are None and have no leaves."""

    def run(carries: Any, inputs: Tree) -> Any:
        (carry, variables, last), (x, given, reset, time) = carries, inputs
        if reset is not None:
            carry = _where(reset, fresh, carry)
        carry, variables, y, made = step(carry, variables, x, given)
        if last_step is not None:
            last = _where(time == last_step, carry, last)
        return (carry, variables, last), (y, made)

    return run


def _where(mask: jax.Array, a: Leaf, b: Leaf) -> Any:
    """Leaves of `a` where the mask, of the batch's shape, is True, else of `b`."""

    def select(a: Leaf, b: Leaf) -> jax.Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * (jnp.ndim(b) - mask.ndim)), a, b)

    return jax.tree.map(select, a, b)


def _last_step(lengths: jax.Array, steps: int) -> jax.Array:
    """The index of each sequence's last step; as in Flax, an empty sequence gets the index of its last padding step."""
    last = lengths - 1
    return jnp.clip(jnp.where(last < 0, last + steps, last), 0, max(steps - 1, 0))


def _check_carry(carry: Tree, batch: tuple[int, ...], option: str) -> None:
    for leaf in jax.tree.leaves(carry):
        if jnp.shape(leaf)[: len(batch)] != batch:
            raise ValueError(
                f"{option} need carries with the batch's axes, {batch}, first, since each element of the batch has its "
                f"own; got one of shape {jnp.shape(leaf)}."
            )


def _checked_lengths(lengths: Leaf, batch: tuple[int, ...]) -> Any:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"seq_lengths must be integers, got {lengths.dtype}.")
    if lengths.shape != batch:
        raise ValueError(f"seq_lengths must have the shape of the batch, {batch}, got {lengths.shape}.")
    return lengths.astype(jnp.int32)  # because indices of steps could overflow a narrower type


def _checked_resets(call: Call, batch: tuple[int, ...], steps: int) -> Any:
    if call.resets is None:
        return None
    resets = jnp.asarray(call.resets)
    if resets.dtype != jnp.bool_:
        raise TypeError(f"resets must be booleans, got {resets.dtype}.")
    wanted = (steps, *batch) if call.time_major else (*batch, steps)
    if resets.shape != wanted:
        order = "(time, *batch)" if call.time_major else "(*batch, time)"
        raise ValueError(f"resets must have the shape {order}, {wanted}, got {resets.shape}.")
    return resets
