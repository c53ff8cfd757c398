"""Reports on all scans that a function or a model calls, by their paths."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from bptt_jax._device.machine import machine_for
from bptt_jax._explain.explain import report_on
from bptt_jax._explain.report import Report
from bptt_jax._jaxprs.arrays import is_array
from bptt_jax._jaxprs.equations import inner_jaxprs
from bptt_jax._jaxprs.types import Device, Eqn, Jaxpr
from bptt_jax._primitives.gradient import asked, backward_p
from bptt_jax._primitives.scan import scan_p
from bptt_jax._trace.call import Arrays, replace, select
from bptt_jax._trace.gradient import Gradient, gradient_of_types

_TRANSFORMATION = re.compile(r"\w*\(|\)")  # of a name stack: "transpose(jvp(Model))/encoder" is "Model/encoder"


class Reports(dict[str, Report]):
    """Reports by the paths of their scans. `str(reports)` is a line for each, and then one after another.

    >>> import jax.numpy as jnp
    >>> from bptt_jax import scan
    >>> reports = explain_calls(lambda xs: scan(lambda c, x: (jnp.sin(c) * x, None), jnp.ones(4), xs), jnp.ones((9, 4)))
    >>> str(reports).splitlines()[0].endswith("no budget, plan 9")
    True
    """

    def __str__(self) -> str:
        if not self:
            return "no scan of bptt_jax is called"
        width = max(map(len, self)) + 2
        lines = [f"{path:<{width}}{report.summary}" for path, report in self.items()]
        return "\n\n".join(["\n".join(lines), *(f"{path}\n\n{report}" for path, report in self.items())])


def explain_calls(f: Callable[..., Any], *args: Any, target: Device = None, **kwargs: Any) -> Reports:
    """Reports on the scans of `bptt_jax`, also those of layers, that a call of a function meets; nothing is run.

    A scan that the function differentiates is reported on for this gradient, with the vmaps around it: pass
    `jax.grad(loss)`, or a whole training step. Any other is reported on as if it were differentiated with respect to
    all of its inputs.

    Args:
      f: the function; it is traced.
      *args, **kwargs: of the call: pytrees of arrays, `jax.ShapeDtypeStruct`s, and values that are no arrays.
      target: as for `bptt_jax.explain`; scans are planned and compiled for it.

    Returns:
      A mapping from paths to `Report`s, in the order of the calls, differentiated ones last. A path is made of the
      names of Linen's modules and of `jax.named_scope`s around the call; for one that was met before it ends in a
      number, "Model/RNN_0 [2]".

    Raises:
      BudgetError: if no plan fits one of the budgets.
      Exception: as `f` raises it.

    >>> import jax, jax.numpy as jnp
    >>> from bptt_jax import scan
    >>> def loss(w, xs):
    ...     with jax.named_scope("encoder"):
    ...         return scan(lambda c, x: (jnp.tanh(w * c + x), None), jnp.zeros(8), xs, budget="60%")[0].sum()
    >>> reports = explain_calls(jax.grad(loss), jnp.ones(8), jax.ShapeDtypeStruct((100, 8), "float32"))
    >>> list(reports)
    ['encoder']
    >>> reports["encoder"].measured_bytes <= reports["encoder"].budget_bytes
    True
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    mask = list(map(is_array, leaves))

    def run(arrays: Arrays) -> Any:
        args, kwargs = jax.tree.unflatten(tree, replace(leaves, mask, arrays))
        return jax.tree.leaves(f(*args, **kwargs))

    reports, numbers = Reports(), collections.Counter[str]()
    with jax.disable_jit(False):  # reports are about compiled programs
        closed = jax.make_jaxpr(run)(select(leaves, mask))
        for one in called(closed.jaxpr):
            numbers[one.path] += 1
            name = one.path if numbers[one.path] == 1 else f"{one.path} [{numbers[one.path]}]"
            reports[name] = _report(one, target)
    return reports


@dataclasses.dataclass(frozen=True)
class Called:
    """A scan of a traced function.

    Attributes:
      path: the names around the call.
      gradient: the gradient; for a scan that is not differentiated, the one with respect to all of its inputs.
      is_differentiated: whether the function differentiates it.
      context: of the call; types may name its mesh.
    """

    path: str
    gradient: Gradient
    is_differentiated: bool
    context: contextlib.AbstractContextManager[Any]


def called(jaxpr: Jaxpr, around: Sequence[str] = ()) -> Iterator[Called]:
    """The scans of a jaxpr, with their paths; those it differentiates last.

    A differentiated scan is known by its backward pass, and these are met from the last scan to the first.
    """
    backward = []
    for eqn in jaxpr.eqns:
        path, types = [*around, *_scopes(eqn)], [v.aval for v in eqn.invars]
        if eqn.primitive is backward_p:
            backward.append(Called(_named(path), asked(types, eqn.params), True, eqn.ctx.manager))
        elif eqn.primitive is scan_p:
            gradient = gradient_of_types(eqn.params["call"], tuple(types))
            yield Called(_named(path), gradient, False, eqn.ctx.manager)
        if eqn.primitive is scan_p or not str(eqn.primitive).startswith("bptt_"):
            for inner in inner_jaxprs(eqn):
                yield from called(inner, path)
    yield from reversed(backward)


def _named(path: Sequence[str]) -> str:
    return "/".join(path) or "scan"


def _scopes(eqn: Eqn) -> list[str]:
    names = _TRANSFORMATION.sub("", str(eqn.source_info.name_stack))
    return [name for name in names.split("/") if name]


def _report(one: Called, target: Device) -> Report:
    gradient = one.gradient
    if target is not None:
        options = dataclasses.replace(gradient.call.options, machine=machine_for(target))
        gradient = dataclasses.replace(gradient, call=dataclasses.replace(gradient.call, options=options))
    with one.context:
        return report_on(gradient)
