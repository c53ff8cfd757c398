"""The base class of all layers of `bptt_jax.linen`: a cell run over time by `bptt_jax.scan`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import FrozenDict

from bptt_jax._explain.report import Report
from bptt_jax._jaxprs.types import Device, Leaf, Tree
from bptt_jax._options import label_of
from bptt_jax._recurrent.cells import explaining_carry
from bptt_jax._recurrent.heads import check_head_inputs, first_step
from bptt_jax._recurrent.recurrence import (
    CALL_OPTIONS,
    SCAN_OPTIONS,
    Call,
    LayerOptions,
    Recurrence,
    batch_shape,
    recurrence,
)
from bptt_jax.linen._cell import LiftedCell, lift_cell
from bptt_jax.linen._lift import Lift

_VALUES = {"variable_axes": "axes", "split_rngs": "booleans"}  # options given as mappings -> their values, for errors


@dataclasses.dataclass(frozen=True)
class Options(LayerOptions):
    """Options of a layer: the ones of `flax.linen.RNN` and the ones of `bptt_jax.scan`. Hashable."""

    variable_axes: Mapping[Any, Any] = FrozenDict()
    variable_broadcast: Any = "params"
    variable_carry: Any = False
    split_rngs: Mapping[Any, bool] = FrozenDict({"params": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        # Mappings, lists and sets become hashable, because options are part of the key of the cache of layer classes.
        for name in _VALUES:
            if not isinstance(given := getattr(self, name), Mapping):
                raise TypeError(f"{name} must map filters of collections to {_VALUES[name]}, got {given!r}.")
            object.__setattr__(self, name, FrozenDict(given))
        for name in ("variable_broadcast", "variable_carry"):
            if isinstance(given := getattr(self, name), list | set):
                object.__setattr__(self, name, tuple(sorted(given)))

    @property
    def scan(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SCAN_OPTIONS}

    @property
    def lift(self) -> Lift:
        return Lift(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Lift)})

    def call(self, *, seq_lengths: Leaf, resets: Leaf, head_inputs: Tree, **overrides: bool | None) -> Call:
        """The options of one call; None stands for the layer's own."""
        chosen = {name: getattr(self, name) if given is None else given for name, given in overrides.items()}
        return Call(**chosen, seq_lengths=seq_lengths, resets=resets, head_inputs=head_inputs)


class Recurrent(nn.Module):
    """A cell run over time: the base class of all layers. Subclasses provide `self.cell`, `_options` and `_head`."""

    @nn.nowrap
    def _options(self) -> Options:
        raise NotImplementedError

    @nn.nowrap
    def _head(self) -> Any:
        """The head, None without one."""
        return None

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Tree = None,
        init_key: jax.Array | None = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        resets: jax.Array | None = None,
        head_inputs: Tree = None,
    ) -> Any:
        """Runs the cell over the inputs, as `flax.linen.RNN` does.

        Args:
          inputs: (*batch, time, *features), or (time, *batch, *features) if `time_major`.
          initial_carry: the first carry; by default the cell's `initialize_carry`.
          init_key: key for `initialize_carry`; by default `jax.random.key(0)`.
          seq_lengths: integers (*batch), the number of steps of each sequence; later steps are padding. The carry
            returned is the one after each sequence's last step, and `reverse` leaves padding at the end.
          return_carry, time_major, reverse, keep_order: override the layer's own.
          resets: booleans (*batch, time), or (time, *batch) if `time_major`. Before the steps marked True the carry is
            set back to the cell's `initialize_carry`, whatever `initial_carry` is: for example, because an episode
            has ended. `flax.linen.RNN` has no counterpart.
          head_inputs: for a layer with a head, a pytree of arrays (*batch, time, ...), or (time, *batch, ...) if
            `time_major`: its leaves at the position of x are the head's second argument, also where `reverse` or
            `seq_lengths` change the order in which positions are run. Those of padding are read as well.

        Returns:
          the outputs, or (last carry, outputs) if `return_carry`. With a head the outputs are its own.

        Raises:
          TypeError, ValueError: for arrays of other types or shapes, and for `head_inputs` that the head does not take
            or lacks.
        """
        options = self._options()
        flags = {"return_carry": return_carry, "time_major": time_major, "reverse": reverse, "keep_order": keep_order}
        call = options.call(seq_lengths=seq_lengths, resets=resets, head_inputs=head_inputs, **flags)
        with explaining_carry(initial_carry, functools.partial(self._first_carry, inputs, init_key, call)):
            lifted, run = self._prepare(inputs, initial_carry, init_key, call)
            progress = None if self.is_initializing() else options.progress
            label = label_of(progress, type(self.cell).__name__)
            carry, carried, outputs, made = run.run(**(options.scan | {"progress": label}))
        lifted.publish(carried, made)
        return (carry, outputs) if call.return_carry else outputs

    def _report(
        self, inputs: jax.Array, target: Device, *, initial_carry: Tree = None, init_key: Any = None, **call: Any
    ) -> Report:
        options = self._options()
        flags = dict.fromkeys(CALL_OPTIONS)
        _, run = self._prepare(inputs, initial_carry, init_key, options.call(**(flags | call)))
        return run.report(target=target, **options.scan)

    @nn.nowrap
    def _first_carry(self, inputs: jax.Array, key: jax.Array | None, call: Call) -> Any:
        """The cell's own first carry."""
        time_axis = call.time_axis(batch_shape(inputs, self.cell.num_feature_axes, call.time_major))
        shape = inputs.shape[:time_axis] + inputs.shape[time_axis + 1 :]
        return self.cell.initialize_carry(jax.random.key(0) if key is None else key, shape)

    @nn.nowrap
    def _prepare(
        self, inputs: jax.Array, carry: Tree, key: jax.Array | None, call: Call
    ) -> tuple[LiftedCell, Recurrence]:
        """The cell and its head as a pure step, and the scan running it."""
        head, batch = self._head(), batch_shape(inputs, self.cell.num_feature_axes, call.time_major)
        time_axis = call.time_axis(batch)
        steps = inputs.shape[time_axis]
        check_head_inputs(head, call.head_inputs, batch, steps, call.time_major)
        fresh = None
        if carry is None or call.resets is not None:
            fresh = self._first_carry(inputs, key, call)
        carry = fresh if carry is None else carry
        both = inputs, call.head_inputs
        # `lift_cell` traces one step beforehand, also for sequences of no steps.
        lifted = lift_cell(self.cell, head, self._options().lift, carry, first_step(both, time_axis), steps)
        return lifted, recurrence(lifted, carry, both, batch, call, fresh)
