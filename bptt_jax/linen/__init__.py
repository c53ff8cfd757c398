"""Flax Linen: recurrent layers whose backward pass stays within a budget of bytes.

`RNN` is `flax.linen.RNN` plus a budget; `rnn` turns a cell class into a layer class. The parameter tree is the one of
`flax.linen.RNN`, so trained weights move both ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

try:
    import flax.linen as nn
    from flax.core import FrozenDict
    from flax.errors import ScopeCollectionNotFound, ScopeParamNotFoundError, ScopeParamShapeError
except ImportError as error:
    raise ImportError("bptt_jax.linen needs Flax; install it with: python -m pip install 'bptt_jax[flax]'") from error

from bptt_jax._budget import Budget
from bptt_jax._explain.calls import Reports, explain_calls
from bptt_jax._explain.report import Report
from bptt_jax._jaxprs.types import Device, Tree
from bptt_jax._recurrent.cells import check_cell, full_name
from bptt_jax._recurrent.heads import check_head
from bptt_jax._recurrent.recurrence import require_array, split_call
from bptt_jax._recurrent.share_budget import share_budget
from bptt_jax.linen._class import layer_class
from bptt_jax.linen._layer import Options, Recurrent
from bptt_jax.linen._stack import Stack
from bptt_jax.plans._nodes import Plan
from bptt_jax.plans._profile import Lowering

__all__ = ["RNN", "Stack", "explain", "rnn", "share_budget"]


def __dir__() -> list[str]:
    return __all__


class RNN(Recurrent):
    """`flax.linen.RNN` with a budget for the temporary bytes of its backward pass.

    Called with inputs (*batch, time, *features), it returns the cell's outputs (*batch, time, *features), or
    (last carry, outputs) with `return_carry`; with `time_major` both are (time, *batch, *features).

    A head is applied to the output of each step inside the scan. With a loss for a head, logits exist for a few steps
    at a time, and the budget covers them. Called with `head_inputs` too, the layer returns what the head makes of each
    step, any pytree of arrays (*batch, ...), stacked along the axis of time, in place of the cell's outputs.

    Attributes:
      cell: an instance of a recurrent cell, for example `nn.LSTMCell(8)`, or a `Stack` of several.
      head: None, or `head(y)`, or `head(y, head_input)`: a module, with variables of its own (alone, under "head") and
        the options of collections and keys below; or a function of arrays that calls no modules.
      time_major, return_carry, reverse, keep_order, variable_axes, variable_broadcast, variable_carry,
        split_rngs: as in `flax.linen.RNN`.
      budget, host_budget, plan, lowering, verify, unroll: as in `bptt_jax.scan`.
      progress: likewise, where True stands for the name of the cell's class.

    Raises:
      TypeError, ValueError: if `cell` is no recurrent cell, `head` cannot be called or an option is malformed; when
        called, if the plan is for another number of steps.
      BudgetError: when a call is differentiated, if no plan fits the budget. `init` does not raise it.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> layer = RNN(nn.LSTMCell(features=8), budget="40%")
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 100, 3)))
    >>> layer.apply(variables, jnp.ones((2, 100, 3))).shape
    (2, 100, 8)

    >>> class Loss(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, y, target):
    ...         return (nn.Dense(5)(y) - target) ** 2
    >>> layer = RNN(nn.LSTMCell(features=8), head=Loss(), budget="40%")
    >>> xs, targets = jnp.ones((2, 100, 3)), jnp.ones((2, 100, 5))
    >>> variables = layer.init(jax.random.key(0), xs, head_inputs=targets)
    >>> sorted(variables["params"])
    ['cell', 'head']
    >>> layer.apply(variables, xs, head_inputs=targets).shape
    (2, 100, 5)
    """

    cell: nn.RNNCellBase
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int | None = None
    variable_axes: Mapping[Any, Any] = FrozenDict()
    variable_broadcast: Any = "params"
    variable_carry: Any = False
    split_rngs: Mapping[Any, bool] = FrozenDict({"params": False})
    budget: Budget = None
    plan: Plan | str | None = None
    lowering: Lowering | None = None
    verify: bool = True
    host_budget: Budget = None
    progress: str | bool | None = None
    head: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.cell, type):
            raise TypeError(
                f"RNN.cell must be a cell, got the class {self.cell.__name__}; give an instance of it, or use rnn(...)."
            )
        check_cell(self.cell, "RNN.cell", nn.Module)
        check_head(self.head, nn.Module)
        self._options()  # only for its checks, because malformed options are to fail here and not in a call
        super().__post_init__()

    @nn.nowrap
    def _options(self) -> Options:
        return Options(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Options)})

    @nn.nowrap
    def _head(self) -> Any:
        return self.head


def rnn(
    cell_class: type[Any] | None = None,
    /,
    *,
    budget: Budget = None,
    plan: Plan | str | None = None,
    lowering: Lowering | None = None,
    unroll: int | bool | None = None,
    time_major: bool = False,
    return_carry: bool = False,
    reverse: bool = False,
    keep_order: bool = False,
    variable_axes: Mapping[Any, Any] = FrozenDict(),
    variable_broadcast: Any = "params",
    variable_carry: Any = False,
    split_rngs: Mapping[Any, bool] = FrozenDict({"params": False}),
    verify: bool = True,
    host_budget: Budget = None,
    progress: str | bool | None = None,
) -> Any:
    """Decorator turning a Linen cell class into a class of recurrent layers with a budget.

    A layer is constructed with the cell's arguments and called with inputs (*batch, time, *features) instead of one
    step's. Its parameter tree is the one of `flax.linen.RNN(Cell(...))`: the cell's, under the name "cell". The cell
    class itself stays reachable as `Layer.cell_class`. A head needs `RNN(Layer.cell_class(...), head=...)`: a class of
    layers has no module to share among its instances.

    Args:
      cell_class: the cell class, if the decorator is written without options.
      budget, host_budget, plan, lowering, verify, unroll: as in `bptt_jax.scan`.
      progress: likewise, where True stands for the name of the cell's class.
      time_major, return_carry, reverse, keep_order, variable_axes, variable_broadcast, variable_carry,
        split_rngs: as in `flax.linen.RNN`, whose documentation lists the options a call can override.

    Raises:
      TypeError: when applied to anything but a class of recurrent cells.
      TypeError, ValueError: for malformed options.
      BudgetError: raised by the layer, as by `RNN`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> LSTM = rnn(budget="40%")(nn.OptimizedLSTMCell)
    >>> layer = LSTM(features=8)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 100, 3)))
    >>> list(variables["params"])
    ['cell']
    >>> layer.apply(variables, jnp.ones((2, 100, 3))).shape
    (2, 100, 8)
    """
    given = locals()
    options = Options(**{field.name: given[field.name] for field in dataclasses.fields(Options)})

    def decorate(cell_class: type[Any]) -> Any:
        if not isinstance(cell_class, type):
            raise TypeError(
                f"rnn(...) decorates a cell class, got an instance of {type(cell_class).__name__}; "
                "for a cell there is RNN(cell, ...), and options have names, such as budget=."
            )
        check_cell(cell_class, "what rnn(...) decorates", nn.Module)
        return layer_class(Recurrent, cell_class, options, isinstance(unroll, bool))

    return decorate if cell_class is None else decorate(cell_class)


def explain(
    model: nn.Module,
    variables: Tree,
    *args: Any,
    target: Device = None,
    rngs: Any = None,
    mutable: Any = False,
    **call: Any,
) -> Report | Reports:
    """Report on a recurrent layer, or on all in a model, for these inputs; gradients are compiled but not run.

    Of an `RNN`, or a layer made by `rnn`, there is one report; see `bptt_jax.explain`. Of any other module there is one
    for each layer and scan of `bptt_jax` that its call meets, by path; see `bptt_jax.explain_calls`.

    Args:
      model: the layer or the model, not inside a parent module.
      variables: its variables, arrays or `jax.ShapeDtypeStruct`s.
      *args: the inputs of a call, likewise; of a layer there is one.
      target: as for `bptt_jax.explain`.
      rngs, mutable: as for `model.apply`, if it needs them.
      **call: other arguments of the call (of a layer, `seq_lengths`, `head_inputs`, ...), because they can change its
        bytes. For example, to return the carry after each sequence's last step, the scan holds one carry more. Arrays
        may be `jax.ShapeDtypeStruct`s here too.

    Raises:
      BudgetError: if no plan fits the budget, at once.
      TypeError: if `model` is no module or `variables` are no mapping, or for an unknown argument of the call.
      ValueError: if `variables` do not match the layer.
      TypeError, ValueError: as raised in the call, for example for `seq_lengths` of another shape.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> layer, xs = RNN(nn.GRUCell(features=16), budget="50%"), jnp.ones((4, 200, 16))
    >>> report = explain(layer, layer.init(jax.random.key(0), xs), xs)
    >>> report.measured_bytes <= report.budget_bytes
    True

    >>> model = nn.Sequential([nn.Dense(16), layer])
    >>> list(explain(model, model.init(jax.random.key(0), xs), xs))
    ['layers_1']
    """
    if not isinstance(model, nn.Module) or isinstance(model, nn.RNNCellBase):
        raise TypeError(
            "explain needs a layer of bptt_jax.linen (RNN, or made by rnn) or a model with one, got "
            f"{full_name(model)}."
        )
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables must be a mapping of collections, as init makes it, got {type(variables).__name__}."
        )
    if isinstance(model, Recurrent):
        return _explain_layer(model, variables, *args, target=target, rngs=rngs, mutable=mutable, **call)

    def apply(variables: Tree, rngs: Any, *args: Any, **call: Any) -> Any:
        return model.apply(variables, *args, rngs=rngs, mutable=mutable, **call)

    reports = explain_calls(apply, variables, rngs, *args, target=target, **call)
    root = f"{model.name or type(model).__name__}/"
    return Reports({path.removeprefix(root): report for path, report in reports.items()})


def _explain_layer(
    layer: Recurrent, variables: Tree, xs: Tree, *, target: Device, rngs: Any, mutable: Any, **call: Any
) -> Report:
    require_array(xs)
    arrays, flags = split_call(call, "init_key", "rngs", "mutable")
    reports: list[Report] = []

    def inspect(variables: Tree, xs: Tree, arrays: Any) -> None:
        def report(layer: Any) -> None:
            reports.append(layer._report(xs, target, **arrays, **flags))

        nn.apply(report, layer, mutable=mutable)(variables, rngs=rngs)

    try:
        # Shapes suffice and nothing is run. The report leaves by a list, because eval_shape returns only shapes.
        jax.eval_shape(inspect, variables, xs, arrays)
    except (ScopeCollectionNotFound, ScopeParamNotFoundError, ScopeParamShapeError) as error:
        raise ValueError(
            f"the variables are not those that {type(layer).__name__}.init makes for such xs: {error} Of a layer "
            'within a model take its own part: {"params": params["Name_0"]} if there is a "cell" in that, or '
            '{"params": {"cell": params["Name_0"]}}.'
        ) from error
    return reports[0]
