"""Flax NNX: recurrent layers whose backward pass stays within a budget of bytes.

`RNN` is `flax.nnx.RNN` plus a budget; `rnn` turns a cell class into a layer class. The state is the one of
`flax.nnx.RNN`, so trained weights move both ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("bptt_jax.nnx needs Flax; install it with: python -m pip install 'bptt_jax[flax]'") from error

from bptt_jax._budget import Budget
from bptt_jax._explain.calls import Reports, explain_calls
from bptt_jax._explain.report import Report
from bptt_jax._jaxprs.types import Device, Tree
from bptt_jax._recurrent.cells import check_cell, full_name
from bptt_jax._recurrent.heads import check_head, refuse_hidden_modules
from bptt_jax._recurrent.recurrence import require_array, split_call
from bptt_jax._recurrent.share_budget import share_budget
from bptt_jax.nnx._class import layer_class
from bptt_jax.nnx._layer import Options, Recurrent
from bptt_jax.nnx._stack import Stack
from bptt_jax.plans._nodes import Plan
from bptt_jax.plans._profile import Lowering

__all__ = ["RNN", "Stack", "explain", "rnn", "share_budget"]


def __dir__() -> list[str]:
    return __all__


class RNN(Recurrent):
    """`flax.nnx.RNN` with a budget for the temporary bytes of its backward pass.

    Called with inputs (*batch, time, *features), it returns the cell's outputs (*batch, time, *features), or
    (last carry, outputs) with `return_carry`; with `time_major` both are (time, *batch, *features).

    A head is applied to the output of each step inside the scan. With a loss for a head, logits exist for a few steps
    at a time, and the budget covers them. Called with `head_inputs` too, the layer returns what the head makes of each
    step, any pytree of arrays (*batch, ...), stacked along the axis of time, in place of the cell's outputs.

    Args:
      cell: an instance of a recurrent cell, for example `nnx.LSTMCell(3, 8, rngs=...)`, or a `Stack` of several.
      time_major, return_carry, reverse, keep_order, state_axes, broadcast_rngs, rngs: as in `flax.nnx.RNN`.
      budget, host_budget, plan, lowering, verify, unroll: as in `bptt_jax.scan`.
      progress: likewise, where True stands for the name of the cell's class.
      head: None, or `head(y)`, or `head(y, head_input)`: a module, whose state is lifted as the cell's, by
        `state_axes` (where paths begin with "cell" or "head" then), and which may share variables with the cell; or
        a function of arrays that calls no modules.

    Raises:
      TypeError, ValueError: if `cell` is no recurrent cell, `head` cannot be called or an option is malformed; when
        called, if the plan is for another number of steps.
      BudgetError: when a call is differentiated, if no plan fits the budget.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> layer = RNN(nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0)), budget="40%")
    >>> layer(jnp.ones((2, 100, 3))).shape
    (2, 100, 8)
    >>> gradient = nnx.grad(lambda layer, xs: layer(xs).sum())(layer, jnp.ones((2, 100, 3)))
    >>> gradient["cell"]["hi"]["kernel"].shape
    (8, 8)

    >>> class Loss(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.dense = nnx.Linear(8, 5, rngs=rngs)
    ...
    ...     def __call__(self, y, target):
    ...         return (self.dense(y) - target) ** 2
    >>> layer = RNN(nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0)), head=Loss(nnx.Rngs(1)), budget="40%")
    >>> layer(jnp.ones((2, 100, 3)), head_inputs=jnp.ones((2, 100, 5))).shape
    (2, 100, 5)
    """

    def __init__(
        self,
        cell: Any,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int | bool | None = None,
        state_axes: Mapping[Any, Any] | None = None,
        broadcast_rngs: Any = None,
        rngs: nnx.Rngs | bool = True,
        budget: Budget = None,
        plan: Plan | str | None = None,
        lowering: Lowering | None = None,
        verify: bool = True,
        host_budget: Budget = None,
        progress: str | bool | None = None,
        head: Any = None,
    ):
        given = locals()
        if isinstance(cell, type):
            raise TypeError(
                f"RNN's cell must be a cell, got the class {cell.__name__}; give an instance of it, or use rnn(...)."
            )
        check_head(head, nnx.Module)
        if not isinstance(head, nnx.Module):
            refuse_hidden_modules(head, lambda value: isinstance(value, nnx.Module))
        super().__init__(cell, _options_of(given), rngs, head)


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
    state_axes: Mapping[Any, Any] | None = None,
    broadcast_rngs: Any = None,
    rngs: bool = True,
    verify: bool = True,
    host_budget: Budget = None,
    progress: str | bool | None = None,
) -> Any:
    """Decorator turning an NNX cell class into a class of recurrent layers with a budget.

    A layer is constructed with the cell's arguments and called with inputs (*batch, time, *features) instead of one
    step's. Its state is the one of `flax.nnx.RNN(Cell(...))`: the cell's, under the name "cell". The cell class itself
    stays reachable as `Layer.cell_class`. A head needs `RNN(Layer.cell_class(...), head=...)`: a class of layers has no
    module to share among its instances.

    Args:
      cell_class: the cell class, if the decorator is written without options.
      budget, host_budget, plan, lowering, verify, unroll: as in `bptt_jax.scan`.
      progress: likewise, where True stands for the name of the cell's class.
      time_major, return_carry, reverse, keep_order, state_axes, broadcast_rngs: as in `flax.nnx.RNN`, whose
        documentation lists the options a call can override.
      rngs: whether layers have keys of their own for the first carries, as `flax.nnx.RNN` has by default.

    Raises:
      TypeError: when applied to anything but a class of recurrent cells.
      TypeError, ValueError: for malformed options.
      BudgetError: raised by the layer, as by `RNN`.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> LSTM = rnn(budget="40%")(nnx.OptimizedLSTMCell)
    >>> layer = LSTM(3, 8, rngs=nnx.Rngs(0))
    >>> list(nnx.state(layer, nnx.Param))
    ['cell']
    >>> layer(jnp.ones((2, 100, 3))).shape
    (2, 100, 8)
    """
    options = _options_of(locals())
    if not isinstance(rngs, bool):
        raise TypeError(f"rnn(...) makes a class, whose rngs can be True or False, got {type(rngs).__name__}.")

    def decorate(cell_class: type[Any]) -> Any:
        if not isinstance(cell_class, type):
            raise TypeError(
                f"rnn(...) decorates a cell class, got an instance of {type(cell_class).__name__}; "
                "for a cell there is RNN(cell, ...), and options have names, such as budget=."
            )
        check_cell(cell_class, "what rnn(...) decorates", nnx.Module)
        return layer_class(Recurrent, cell_class, options, rngs, isinstance(unroll, bool))

    return decorate if cell_class is None else decorate(cell_class)


def explain(
    model: nnx.Module, *args: Any, target: Device = None, rngs: nnx.Rngs | None = None, **call: Any
) -> Report | Reports:
    """Report on a recurrent layer, or on all in a model, for these inputs; gradients are compiled but not run.

    Of an `RNN`, or a layer made by `rnn`, there is one report; see `bptt_jax.explain`. Of any other module there is one
    for each layer and scan of `bptt_jax` that its call meets, by path; see `bptt_jax.explain_calls`.

    Args:
      model: the layer or the model; its state may be `jax.ShapeDtypeStruct`s, as from `nnx.eval_shape`.
      *args: the inputs of a call, arrays or `jax.ShapeDtypeStruct`s; of a layer there is one.
      target: as for `bptt_jax.explain`.
      rngs: as for calling the model, if it takes them; nothing is drawn from them.
      **call: other arguments of the call (of a layer, `seq_lengths`, `head_inputs`, ...), because they can change its
        bytes. For example, to return the carry after each sequence's last step, the scan holds one carry more. Arrays
        may be `jax.ShapeDtypeStruct`s here too.

    Raises:
      BudgetError: if no plan fits the budget, at once.
      TypeError: if `model` is no module, or for an unknown argument of the call.
      TypeError, ValueError: as raised in the call, for example for `seq_lengths` of another shape.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> layer = RNN(nnx.GRUCell(16, 16, rngs=nnx.Rngs(0)), budget="50%")
    >>> report = explain(layer, jnp.ones((4, 200, 16)))
    >>> report.measured_bytes <= report.budget_bytes
    True

    >>> model = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), layer)
    >>> list(explain(model, jnp.ones((4, 200, 16))))
    ['layers/1']
    """
    if not isinstance(model, nnx.Module) or isinstance(model, nnx.RNNCellBase):
        raise TypeError(
            f"explain needs a layer of bptt_jax.nnx (RNN, or made by rnn) or a model with one, got {full_name(model)}."
        )
    # A copy is reported on, so the model and its keys stay as they are.
    graphdef, state = nnx.split((model, rngs), graph=True)

    def copy(state: Any) -> Any:
        return nnx.merge(graphdef, state)

    if not isinstance(model, Recurrent):
        return _explain_model(copy, state, *args, target=target, **call)
    return _explain_layer(copy, state, *args, target=target, **call)


def _explain_layer(copy: Callable[[Any], Any], state: Any, xs: Tree, *, target: Device, **call: Any) -> Report:
    require_array(xs)
    arrays, flags = split_call(call, "rngs")
    reports: list[Report] = []

    def inspect(state: Any, xs: Tree, arrays: Any) -> None:
        layer, rngs = copy(state)
        reports.append(layer._report(xs, target, rngs=rngs, **arrays, **flags))

    # Shapes suffice and nothing is run. The report leaves by a list, because eval_shape returns only shapes.
    jax.eval_shape(inspect, state, xs, arrays)
    return reports[0]


def _explain_model(copy: Callable[[Any], Any], state: Any, *args: Any, target: Device, **call: Any) -> Reports:
    def run(state: Any, *args: Any, **call: Any) -> Any:
        model, rngs = copy(state)
        for path, module in nnx.iter_modules(model):
            if isinstance(module, Recurrent):
                module.path = "/".join(map(str, path))
        return model(*args, **call, **({} if rngs is None else {"rngs": rngs}))

    return explain_calls(run, state, *args, target=target, **call)


def _options_of(given: Mapping[str, Any]) -> Options:
    return Options(**{field.name: given[field.name] for field in dataclasses.fields(Options)})
