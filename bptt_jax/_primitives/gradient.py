"""The primitives of a differentiated scan.

    forward    runs the scan and keeps the arrays named by the plan; its parameters are the request (the call and the
               differentiated inputs), because the plan follows from it
    tangent    from tangents of inputs to tangents of results: evaluated it is forward mode, transposed `backward`
    backward   from kept arrays and cotangents of results to cotangents of inputs

Under vmap every example has gradients of its own, and one plan serves all of them. The vmaps are found where the scan
is differentiated (`vmaps_around`), because the types of the kept arrays are settled there. If a gradient is mapped only
after it was traced (for example, `vmap` of a `jit` of a gradient), these types cannot change any more. Then `backward`
makes the plan for all examples, and runs forward once more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching
from jax.interpreters import partial_eval as pe

from bptt_jax._caches import remember
from bptt_jax._jaxprs.equations import is_named_axis
from bptt_jax._jaxprs.types import Leaf
from bptt_jax._lower import plain
from bptt_jax._lower.host import to_host
from bptt_jax._options import Options
from bptt_jax._pipeline import Choice, choose, told
from bptt_jax._primitives.expansion import jvp_of, primitive
from bptt_jax._trace.active import active, reached
from bptt_jax._trace.call import Mask, ScanCall, replace, select
from bptt_jax._trace.gradient import Gradient, Vmap, mapped

Vmaps = tuple[Vmap, ...]


def _forward(*inputs: Leaf, vmaps: Vmaps, **params: Any) -> list[Any]:
    return list(mapped(vmaps, forward_of_one(vmaps=vmaps, **params))(*inputs))


def forward_of_one(
    *, call: ScanCall, wrt: Mask, planned: Vmaps, vmaps: Vmaps, used: Mask | None = None, transfers: Any = None
) -> Callable[..., list[Any]]:
    """The function of a `forward` for one example; see `_prune` for `used`, and `transfers_of` for `transfers`."""
    del transfers
    mapped_over = _mapped_over(vmaps, len(wrt))

    def of_one(*inputs: Leaf) -> list[Any]:
        program = _choice(call, wrt, inputs, planned).program(waits=not vmaps)
        if not _is_late(call, planned, mapped_over):
            outs, saved = program.forward(inputs)
            return only_used([*outs, *saved], used)
        # Results are of the plan for all examples. `backward` uses nothing that the other one keeps: XLA drops it.
        outs, _ = _choice(call, wrt, inputs, mapped_over, again=True).program(waits=False).forward(inputs)
        return only_used([*outs, *program.kept(inputs)], used)

    return of_one


def only_used(results: list[Any], used: Mask | None) -> list[Any]:
    """The results of a `forward` that are used; None stands for all."""
    return results if used is None else select(results, used)


def _prune(used: list[bool], *rest: Any) -> tuple[list[bool], Any]:
    """Drops unused results of a `forward` when JAX drops dead code, and the work for them: XLA does not, in loops."""
    eqn = rest[-1]  # after JAX 0.10 an argument about references comes before it
    if all(used):
        return [True] * len(eqn.invars), eqn
    if not any(used) and not eqn.effects:
        return [False] * len(eqn.invars), None
    before = eqn.params["used"] or (True,) * len(used)
    places = [i for i, was_used in enumerate(before) if was_used]
    kept = {place for place, is_used in zip(places, used, strict=True) if is_used}
    params = eqn.params | {"used": tuple(i in kept for i in range(len(before)))}
    outvars = select(eqn.outvars, used)
    return [True] * len(eqn.invars), eqn.replace(params=params, outvars=outvars)


def _tangent(
    *args: Leaf, call: ScanCall, wrt: Mask, planned: Vmaps, n_saved: int, vmaps: Vmaps, transfers: Any
) -> list[Any]:
    del planned, transfers  # for its transpose
    found, n, quiet = active(call.step, wrt), len(wrt), call.quiet

    def of_one(*args: Leaf) -> list[Any]:
        inputs, tangents = args[:n], iter(args[n + n_saved :])
        given = [
            next(tangents) if chosen else ad.Zero(jax.typeof(p).to_tangent_aval())
            for p, chosen in zip(inputs, wrt, strict=True)
        ]
        _, outs = jvp_of(lambda *inputs: plain.run(quiet, inputs), inputs, given)
        return select(outs, (*found.carry, *found.y))

    return list(mapped(vmaps, of_one)(*args))


def _backward(*args: Leaf, vmaps: Vmaps, **params: Any) -> list[Any]:
    return list(mapped(vmaps, backward_of_one(vmaps=vmaps, **params))(*args))


def backward_of_one(
    *, call: ScanCall, wrt: Mask, given: Mask, n_saved: int, planned: Vmaps, vmaps: Vmaps, transfers: Any = None
) -> Callable[..., list[Any]]:
    """The function of a `backward` for one example; see `transfers_of` for `transfers`."""
    del transfers
    n, n_kept = len(wrt), len(wrt) + n_saved
    wanted = select(returned(call, wrt, given), wrt)
    is_late = _is_late(call, planned, _mapped_over(vmaps, n))

    def of_one(*args: Leaf) -> list[Any]:
        inputs, saved, cts = args[:n], list(args[n:n_kept]), args[n_kept:]
        choice = choice_of_backward(inputs, call, wrt, planned, vmaps)
        program = choice.program(waits=not vmaps)
        if is_late:
            told(choice)
            saved = program.kept(inputs)
        found = program.backward(inputs, saved, replace([None] * len(given), given, cts))
        zeros = [ad.Zero(jax.typeof(leaf).to_tangent_aval()) for leaf in select(inputs, wrt)]
        pairs = zip(found, zeros, wanted, strict=True)
        return [ad.instantiate_zeros(zero if ct is None else ct) for ct, zero, is_wanted in pairs if is_wanted]

    return of_one


def choice_of_backward(inputs: Sequence[Any], call: ScanCall, wrt: Mask, planned: Vmaps, vmaps: Vmaps) -> Choice:
    """The choice of a `backward` for inputs of one example."""
    mapped_over = _mapped_over(vmaps, len(wrt))
    is_late = _is_late(call, planned, mapped_over)
    return _choice(call, wrt, inputs, mapped_over if is_late else planned, again=is_late)


forward_p = primitive("forward", _forward)
tangent_p = primitive("tangent", _tangent)
backward_p = primitive("backward", _backward)
EXPANSIONS = {forward_p: _forward, backward_p: _backward}


def transfers_of(options: Options) -> Any:
    """A jaxpr with a transfer to the host, where a call may keep values there; else None.

    It is a parameter of equations because JAX looks for transfers in their jaxprs before it lowers any, and cannot see
    those that a primitive expands to.
    """
    return _transfer() if options.may_use_host else None


@remember(1)
def _transfer() -> Any:
    return jax.make_jaxpr(to_host)(0.0)


def _mapped_over(vmaps: Vmaps, n: int) -> Vmaps:
    """The vmaps over some of the n inputs: one over cotangents alone does not map the forward pass."""
    return tuple(vmap.of_first(n) for vmap in vmaps if any(dim is not None for dim in vmap.dims[:n]))


def _is_late(call: ScanCall, planned: Vmaps, mapped_over: Vmaps) -> bool:
    """Whether a plan was made for other vmaps than there are; without a budget the plan is always the same."""
    return call.options.budget is not None and mapped_over != planned


def _choice(call: ScanCall, wrt: Mask, inputs: Sequence[Any], planned: Vmaps, again: bool = False) -> Choice:
    return choose(Gradient(call, wrt, tuple(map(jax.typeof, inputs)), planned, again))


def asked(types: Sequence[Any], params: Mapping[str, Any]) -> Gradient:
    """The gradient of a `backward`, for arguments of these types and with these parameters."""
    call, planned, wrt = params["call"], params["planned"], params["wrt"]
    n, found = len(wrt), list[Gradient]()
    mapped_over = _mapped_over(params["vmaps"], n)

    def of_one(*inputs: Leaf) -> list[Any]:
        late = _is_late(call, planned, mapped_over)
        found.append(Gradient(call, wrt, tuple(map(jax.typeof, inputs)), mapped_over, late))
        return []

    jax.make_jaxpr(mapped([vmap.of_first(n) for vmap in params["vmaps"]], of_one))(*types[:n])
    return found[0]


def returned(call: ScanCall, wrt: Mask, given: Mask) -> Mask:
    """The mask of inputs with a gradient from `backward`, for cotangents of some active results."""
    found = active(call.step, wrt)
    n = sum(found.carry)
    masks = reached(call.step, found, given[:n], given[n:])
    return tuple(a and b for a, b in zip(wrt, (m for mask in masks for m in mask), strict=True))


def _transpose(
    cts: Sequence[Any], *args: Leaf, call: ScanCall, wrt: Mask, n_saved: int, vmaps: Vmaps, **params: Any
) -> list[Any]:
    n = len(wrt) + n_saved
    given = tuple(type(ct) is not ad.Zero for ct in cts)
    cts = select(cts, given)
    params |= {"call": call, "wrt": wrt, "n_saved": n_saved, "vmaps": with_cotangents(vmaps, n, len(cts))}
    found = iter(backward_p.bind(*args[:n], *cts, given=given, **params))
    gradients = [next(found) if is_returned else None for is_returned in select(returned(call, wrt, given), wrt)]
    results = [
        None if gradient is None else of_argument(gradient, i, vmaps) for i, gradient in enumerate(gradients, start=n)
    ]
    return [None] * n + [r if ad.is_undefined_primal(t) else None for r, t in zip(results, args[n:], strict=True)]


def with_cotangents(vmaps: Vmaps, n: int, n_cts: int) -> Vmaps:
    """The vmaps over the first n arguments and cotangents, these over their first axis, as `batch` makes results."""
    return tuple(dataclasses.replace(v, dims=(*v.dims[:n], *[0] * n_cts)) for v in vmaps)


def of_argument(gradient: Any, i: int, vmaps: Vmaps) -> Any:
    """An argument's gradient from the gradients of all examples, its first axes: summed where they share it."""
    if not vmaps:
        return gradient
    *inner, outer = vmaps
    dim = outer.dims[i]
    of_one = functools.partial(of_argument, i=i, vmaps=tuple(inner))
    found = jax.vmap(of_one, out_axes=0 if dim is None else dim)(gradient)
    return jnp.sum(found, 0) if dim is None else found


def batch(
    primitive: Any, axis: Any, args: Sequence[Any], dims: Sequence[Any], *, vmaps: Vmaps, **params: Any
) -> tuple[list[Any], list[Any]]:
    if all(dim is None for dim in dims) and not names_axis(params["call"], axis.name):
        outs = primitive.bind(*args, vmaps=vmaps, **params)
        return outs, [None] * len(outs)
    vmaps = (*vmaps, Vmap(axis.name, axis.size, axis.spmd_name, tuple(dims)))
    outs = primitive.bind(*args, vmaps=vmaps, **params)
    return outs, [0] * len(outs)


def names_axis(call: ScanCall, name: Any) -> bool:
    """Whether the step uses a named axis: then it must be mapped over the axis, even where no input is."""
    return any(is_named_axis(effect) and effect.name == name for effect in call.step.jaxpr.effects)


def vmaps_around(args: Sequence[Any]) -> Vmaps:
    """The vmaps around some arguments, the innermost first."""
    found = _Found()
    probe_p.bind(*args, found=found)
    return tuple(found.vmaps)


class _Found:
    """Filled by the rule for vmap."""

    def __init__(self) -> None:
        self.vmaps: list[Vmap] = []


def _probe(axis: Any, args: Sequence[Any], dims: Sequence[Any], *, found: _Found) -> tuple[list[Any], list[Any]]:
    if any(dim is not None for dim in dims):
        found.vmaps.append(Vmap(axis.name, axis.size, axis.spmd_name, tuple(dims)))
    return probe_p.bind(*args, found=found), []


# Without results, nothing of a probe reaches XLA. Later vmaps of a staged jaxpr fill lists read by nobody.
probe_p = primitive("probe", lambda *_, found: [])
probe_p.def_impl(lambda *_, found: [])  # outside jit nothing is compiled for it
batching.fancy_primitive_batchers[probe_p] = _probe
pe.dce_rules[forward_p] = _prune
ad.primitive_transposes[tangent_p] = _transpose
for _primitive in (forward_p, tangent_p, backward_p):
    batching.fancy_primitive_batchers[_primitive] = functools.partial(batch, _primitive)
