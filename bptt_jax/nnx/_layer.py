"""The base class of all layers of `bptt_jax.nnx`: a cell run over time by `bptt_jax.scan`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from bptt_jax._explain.report import Report
from bptt_jax._jaxprs.types import Device, Leaf, Tree
from bptt_jax._options import label_of
from bptt_jax._recurrent.cells import check_cell, explaining_carry
from bptt_jax._recurrent.heads import check_head_inputs
from bptt_jax._recurrent.recurrence import (
    CALL_OPTIONS,
    SCAN_OPTIONS,
    Call,
    LayerOptions,
    Recurrence,
    batch_shape,
    recurrence,
)
from bptt_jax.nnx._lift import Lifted, lifted_cell, modules_of


@dataclasses.dataclass(frozen=True)
class Options(LayerOptions):
    """Options of a layer: the ones of `flax.nnx.RNN` and the ones of `bptt_jax.scan`. Hashable."""

    state_axes: Mapping[Any, Any] | None = None
    broadcast_rngs: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "state_axes", _checked_axes(self.state_axes))
        if isinstance(self.broadcast_rngs, list):
            object.__setattr__(self, "broadcast_rngs", tuple(self.broadcast_rngs))


class Recurrent(nnx.RNN):
    """A cell run over time: the base class of all layers. Subclasses provide the cell and the options."""

    path = ""  # in the model that `explain` reports on; a name of the layer's operations

    def __init__(self, cell: Any, options: Options, rngs: Any, head: Any = None):
        check_cell(cell, "the cell of an RNN", nnx.Module)
        # By Flax's constructor, because the state has to be the one of Flax's layer, keys for first carries included.
        super().__init__(cell, rngs=rngs)
        for field in dataclasses.fields(Options):
            setattr(self, field.name, getattr(options, field.name))
        self.head = head

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Tree = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Any = None,
        resets: jax.Array | None = None,
        head_inputs: Tree = None,
    ) -> Any:
        """Runs the cell over the inputs, as `flax.nnx.RNN` does.

        Args:
          inputs: (*batch, time, *features), or (time, *batch, *features) if `time_major`.
          initial_carry: the first carry; by default the cell's `initialize_carry`.
          seq_lengths: integers (*batch), the number of steps of each sequence; later steps are padding. The carry
            returned is the one after each sequence's last step, and `reverse` leaves padding at the end.
          return_carry, time_major, reverse, keep_order: override the layer's own.
          rngs: keys for `initialize_carry`, instead of the layer's own.
          resets: booleans (*batch, time), or (time, *batch) if `time_major`. Before the steps marked True the carry is
            set back to the cell's `initialize_carry`, whatever `initial_carry` is: for example, because an episode
            has ended. `flax.nnx.RNN` has no counterpart.
          head_inputs: for a layer with a head, a pytree of arrays (*batch, time, ...), or (time, *batch, ...) if
            `time_major`: its leaves at the position of x are the head's second argument, also where `reverse` or
            `seq_lengths` change the order in which positions are run. Those of padding are read as well.

        Returns:
          the outputs, or (last carry, outputs) if `return_carry`. With a head the outputs are its own.

        Raises:
          TypeError, ValueError: for arrays of other types or shapes, and for `head_inputs` that the head does not take
            or lacks.
        """
        flags = {"return_carry": return_carry, "time_major": time_major, "reverse": reverse, "keep_order": keep_order}
        call = self._call(seq_lengths=seq_lengths, resets=resets, head_inputs=head_inputs, **flags)
        named = jax.named_scope(self.path) if self.path else contextlib.nullcontext()
        explained = explaining_carry(initial_carry, lambda: self._first_carry(inputs, nnx.Rngs(0), call))
        with named, explained, self._prepared(inputs, initial_carry, rngs, call) as (lifted, run):
            carry, carried, outputs, made = run.run(**self._scan_options)
            lifted.publish(carried, made)
        return (carry, outputs) if call.return_carry else outputs

    def _report(
        self, inputs: jax.Array, target: Device, *, initial_carry: Tree = None, rngs: Any = None, **call: Any
    ) -> Report:
        chosen = self._call(**(dict.fromkeys(CALL_OPTIONS) | call))
        with self._prepared(inputs, initial_carry, rngs, chosen) as (_, run):
            return run.report(target=target, **self._scan_options)

    @property
    def _scan_options(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in SCAN_OPTIONS}
        return found | {"progress": label_of(found["progress"], type(self.cell).__name__)}

    def _call(self, *, seq_lengths: Leaf, resets: Leaf, head_inputs: Tree, **overrides: bool | None) -> Call:
        """The options of one call; None stands for the layer's own."""
        chosen = {name: getattr(self, name) if given is None else given for name, given in overrides.items()}
        return Call(**chosen, seq_lengths=seq_lengths, resets=resets, head_inputs=head_inputs)

    def _first_carry(self, inputs: jax.Array, rngs: Any, call: Call) -> Any:
        """The cell's own first carry."""
        time_axis = call.time_axis(batch_shape(inputs, self.cell.num_feature_axes, call.time_major))
        return self.cell.initialize_carry(inputs.shape[:time_axis] + inputs.shape[time_axis + 1 :], rngs)

    @contextlib.contextmanager
    def _prepared(self, inputs: jax.Array, carry: Tree, rngs: Any, call: Call) -> Iterator[tuple[Lifted, Recurrence]]:
        """The cell and its head as a pure step, and the scan running it."""
        batch = batch_shape(inputs, self.cell.num_feature_axes, call.time_major)
        check_head_inputs(self.head, call.head_inputs, batch, inputs.shape[call.time_axis(batch)], call.time_major)
        rngs = self.rngs if rngs is None else rngs
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs.carry.fork()  # as in Flax
        fresh = None
        if carry is None or call.resets is not None:
            fresh = self._first_carry(inputs, rngs, call)
        carry = fresh if carry is None else carry
        broadcast = nnx.All(nnx.RngState, self.broadcast_rngs)
        axes = nnx.StateAxes({broadcast: None, **_checked_axes(self.state_axes)})
        # As in Flax, each call draws keys for all its steps to share; after it the streams are back, one key further.
        only, modules = self.broadcast_rngs, modules_of(self.cell, self.head)
        streams = nnx.split_rngs(modules, splits=1, only=only, squeeze=True, graph=True, graph_updates=True)
        with streams, lifted_cell(self.cell, self.head, axes) as lifted:
            yield lifted, recurrence(lifted, carry, (inputs, call.head_inputs), batch, call, fresh)


def _checked_axes(state_axes: Any) -> nnx.StateAxes:
    """The axes of the state, hashable because layers can be arguments of `nnx.jit`."""
    if not state_axes:
        state_axes = {...: nnx.Carry}
    if not isinstance(state_axes, Mapping):
        raise TypeError(f"state_axes must map filters to axes, got {state_axes!r}.")
    for filter_, axis in state_axes.items():
        if not (axis is None or axis is nnx.Carry or (isinstance(axis, int) and not isinstance(axis, bool))):
            raise ValueError(
                f"state_axes maps {filter_!r} to {axis!r}; an axis is nnx.Carry (one step hands the state to the "
                "next), an int (each step has its own) or None (all steps share it)."
            )
    return nnx.StateAxes(state_axes)
