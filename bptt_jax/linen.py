"""Flax Linen: recurrent layers whose backward pass stays within a budget of bytes.

`RNN` is `flax.linen.RNN` plus a budget; `rnn` makes such a layer of a cell class. The parameter tree is the one of
`flax.linen.RNN`, so trained weights move both ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

try:
    import flax.linen as nn
    from flax.core import FrozenDict
    from flax.errors import InvalidRngError
except ImportError as error:
    raise ImportError("bptt_jax.linen needs Flax; install it with: python -m pip install 'bptt_jax[flax]'") from error

from bptt_jax._choose import Budget
from bptt_jax._explain import Report
from bptt_jax._explain import explain as _explain
from bptt_jax._linen_class import layer_class
from bptt_jax._plan import Plan
from bptt_jax._scan import checked_options, scan

__all__ = ["RNN", "explain", "rnn"]


@dataclasses.dataclass(frozen=True)
class _Options:
    """How a layer runs its cell: the options of `flax.linen.RNN` and those of `bptt_jax.scan`."""

    budget: Budget = None
    plan: Plan | None = None
    differentiation: str = "reverse"
    unroll: int | bool = 1
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    calibrate: bool = True

    def __post_init__(self) -> None:
        checked_options(self.budget, self.plan, self.differentiation, self.calibrate)

    @property
    def scan(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("budget", "plan", "differentiation", "calibrate", "unroll")}


class _Recurrent(nn.Module):
    """A cell run over time. What the layers share: they differ in where `self.cell` and the options come from."""

    @nn.nowrap
    def _options(self) -> _Options:
        raise NotImplementedError

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Any = None,
        init_key: jax.Array | None = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Runs the cell over the inputs, as `flax.linen.RNN` does.

        Args:
          inputs: (*batch, time, *features), or (time, *batch, *features) if `time_major`.
          initial_carry: the first carry; by default the cell's `initialize_carry`.
          init_key: key for `initialize_carry`; by default `jax.random.key(0)`.
          seq_lengths: not available yet; raises NotImplementedError.
          return_carry, time_major, reverse, keep_order: override the layer's own.

        Returns:
          the outputs, or (last carry, outputs) if `return_carry`.
        """
        if seq_lengths is not None:
            raise NotImplementedError("seq_lengths is not available in bptt_jax.linen yet; flax.linen.RNN has it.")
        overrides: dict[str, Any] = {
            "return_carry": return_carry,
            "time_major": time_major,
            "reverse": reverse,
            "keep_order": keep_order,
        }
        options = dataclasses.replace(self._options(), **{k: v for k, v in overrides.items() if v is not None})
        step, carry, xs, time_axis = self._prepare(inputs, initial_carry, init_key, options.time_major)
        carry, outputs = scan(step, carry, xs, reverse=options.reverse, **options.scan)
        if options.reverse and not options.keep_order:
            outputs = jax.tree.map(lambda leaf: jnp.flip(leaf, 0), outputs)
        outputs = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, time_axis), outputs)
        return (carry, outputs) if options.return_carry else outputs

    def _report(self, inputs: jax.Array, target: Any) -> Report:
        options = self._options()
        step, carry, xs, _ = self._prepare(inputs, None, None, options.time_major)
        return _explain(step, carry, xs, reverse=options.reverse, target=target, **options.scan)

    @nn.nowrap
    def _prepare(self, inputs: jax.Array, carry: Any, key: jax.Array | None, time_major: bool) -> tuple[Any, ...]:
        """The cell as a pure step, the first carry, the time-major inputs and the time axis of the inputs as given."""
        time_axis = 0 if time_major else inputs.ndim - (self.cell.num_feature_axes + 1)
        xs = jnp.moveaxis(inputs, time_axis, 0)
        if carry is None:
            carry = self.cell.initialize_carry(jax.random.key(0) if key is None else key, xs.shape[1:])
        if self.is_initializing():
            self.cell(carry, xs[0])
        cell, variables = self.cell.unbind()
        unknown = sorted(set(variables) - {"params"})
        if unknown:
            raise NotImplementedError(
                f"the cell {type(cell).__name__} has variables in {unknown}, but bptt_jax.linen runs cells with "
                "variables in 'params' only so far; flax.linen.RNN has variable_axes, variable_broadcast and "
                "variable_carry for others."
            )

        def step(carry: Any, x: Any) -> Any:
            try:
                return cell.apply(variables, carry, x)
            except InvalidRngError as error:
                raise NotImplementedError(
                    f"the cell {type(cell).__name__} draws random numbers of its own (dropout, say), which is not "
                    "available in bptt_jax.linen yet; flax.linen.RNN has it."
                ) from error

        return step, carry, xs, time_axis


def _check_cell(cell: Any, what: str) -> None:
    """Raises unless `cell` (a module or a class of modules) is a recurrent cell."""
    wanted = ("initialize_carry", "num_feature_axes")
    missing = [name for name in wanted if not hasattr(cell if isinstance(cell, type) else type(cell), name)]
    module = issubclass(cell, nn.Module) if isinstance(cell, type) else isinstance(cell, nn.Module)
    if module and not missing:
        return
    name = f"the class {cell.__name__}" if isinstance(cell, type) else f"an instance of {type(cell).__name__}"
    found = "which is no flax.linen module" if not module else f"which has no {' and no '.join(missing)}"
    raise TypeError(
        f"{what} must be a recurrent cell such as flax.linen.LSTMCell or a subclass of flax.linen.RNNCellBase, "
        f"got {name}, {found}."
    )


class RNN(_Recurrent):
    """`flax.linen.RNN` with a budget for the temporary bytes of its backward pass.

    Attributes:
      cell: a recurrent cell.
      time_major, return_carry, reverse, keep_order, unroll: as in `flax.linen.RNN`.
      variable_axes, variable_broadcast, variable_carry, split_rngs: as in `flax.linen.RNN`; only the defaults are
        available yet, other values raise NotImplementedError.
      budget, plan, differentiation, calibrate: as in `bptt_jax.scan`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> layer = RNN(nn.LSTMCell(features=8), budget="40%")
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 100, 3)))
    >>> layer.apply(variables, jnp.ones((2, 100, 3))).shape
    (2, 100, 8)
    """

    cell: nn.RNNCellBase
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    variable_axes: Mapping[Any, Any] = FrozenDict()
    variable_broadcast: Any = "params"
    variable_carry: Any = False
    split_rngs: Mapping[Any, bool] = FrozenDict({"params": False})
    budget: Budget = None
    plan: Plan | None = None
    differentiation: str = "reverse"
    calibrate: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.cell, type):
            raise TypeError(f"RNN.cell must be a cell, got the class {self.cell.__name__}; for that there is rnn(...).")
        _check_cell(self.cell, "RNN.cell")
        available = {
            "variable_axes": {},
            "variable_broadcast": "params",
            "variable_carry": False,
            "split_rngs": {"params": False},
        }
        for name, value in available.items():
            given = getattr(self, name)
            if (dict(given) if isinstance(given, Mapping) else given) != value:
                raise NotImplementedError(
                    f"RNN({name}={given!r}) is not available in bptt_jax.linen yet, only {value!r}; "
                    "flax.linen.RNN has it."
                )
        self._options()
        super().__post_init__()

    @nn.nowrap
    def _options(self) -> _Options:
        return _Options(**{field.name: getattr(self, field.name) for field in dataclasses.fields(_Options)})


def rnn(
    *,
    budget: Budget = None,
    plan: Plan | None = None,
    differentiation: str = "reverse",
    unroll: int | bool = 1,
    time_major: bool = False,
    return_carry: bool = False,
    reverse: bool = False,
    keep_order: bool = False,
    calibrate: bool = True,
) -> Callable[[type[nn.Module]], Any]:
    """Decorator: from a Linen cell class to the class of a recurrent layer with a budget.

    The layer takes the cell's constructor arguments, and inputs (*batch, time, *features) instead of one step's. Its
    parameters are those of `flax.linen.RNN(Cell(...))`: the cell's, under the name "cell". The cell class itself stays
    reachable as `Layer.cell_class`.

    Args:
      budget, plan, differentiation, calibrate: as in `bptt_jax.scan`.
      unroll, time_major, return_carry, reverse, keep_order: as in `flax.linen.RNN`; the last four can be overridden
        in the call.

    Raises:
      TypeError: when applied to a class that is no recurrent cell.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> LSTM = rnn(budget="40%")(nn.OptimizedLSTMCell)
    >>> layer = LSTM(features=8)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 100, 3)))
    >>> list(variables["params"])
    ['cell']
    >>> layer.apply(variables, jnp.ones((2, 100, 3))).shape
    (2, 100, 8)
    """
    options = _Options(budget, plan, differentiation, unroll, time_major, return_carry, reverse, keep_order, calibrate)

    def decorate(cell_class: Any) -> Any:
        if not isinstance(cell_class, type):
            raise TypeError(
                f"rnn(...) decorates a cell class, got an instance of {type(cell_class).__name__}; "
                "for a cell there is RNN(cell, ...)."
            )
        _check_cell(cell_class, "what rnn(...) decorates")
        return layer_class(_Recurrent, cell_class, options, isinstance(unroll, bool))

    return decorate


def explain(layer: nn.Module, variables: Any, xs: Any, *, target: Any = None) -> Report:
    """What a recurrent layer takes for these inputs, compiled but not run; see `bptt_jax.explain`.

    Args:
      layer: an `RNN` or a layer made by `rnn`, not inside a parent.
      variables: its variables, arrays or `jax.ShapeDtypeStruct`s.
      xs: inputs as for calling it, likewise.
      target: as for `bptt_jax.explain`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> layer, xs = RNN(nn.GRUCell(features=16), budget="50%"), jnp.ones((4, 200, 16))
    >>> report = explain(layer, layer.init(jax.random.key(0), xs), xs)
    >>> report.measured_bytes <= report.budget_bytes
    True
    """
    if not isinstance(layer, _Recurrent):
        raise TypeError(f"explain needs a layer of bptt_jax.linen (RNN, or made by rnn), got {type(layer).__name__}.")
    reports: list[Report] = []

    def inspect(variables: Any, xs: Any) -> None:
        report: Any = layer.apply(variables, xs, target, method="_report")
        reports.append(report)

    jax.eval_shape(inspect, variables, xs)
    return reports[0]
