"""A bound Linen module as a pure function of a step: variables and keys go in and out as in `flax.linen.scan`.

`flax.linen.scan` sorts the collections of variables into three kinds. They are shared by all steps (broadcast), handed
from one step to the next (carry), or separate for each step (stacked along an axis). Keys are shared by all steps or
split for each. Here each step has a scope of its own, and the module (a cell, or a head) is bound to it while the step
is traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList, FrozenDict, Scope, unfreeze
from flax.typing import In, Out

from bptt_jax._jaxprs.types import Tree


@dataclasses.dataclass(frozen=True)
class Lift:
    """Options of `flax.linen.scan` for collections and keys, under its own names.

    Attributes:
      variable_axes: filters of the collections separate for each step, with the axis they are stacked along.
      variable_broadcast: filter of the collections shared by all steps.
      variable_carry: filter of the collections handed from one step to the next.
      split_rngs: filters of the keys given to steps, with whether each step gets its own.
    """

    variable_axes: Mapping[Any, Any] = FrozenDict()
    variable_broadcast: Any = "params"
    variable_carry: Any = False
    split_rngs: Mapping[Any, bool] = FrozenDict({"params": False})

    def kind(self, collection: str) -> Any:
        """Kind of a collection: "broadcast", "carry", the `_Axis` it is stacked along; None if steps do not see it."""
        # In the order of Flax: the first filter to match takes the collection.
        if _matches(self.variable_broadcast, collection):
            return "broadcast"
        if _matches(self.variable_carry, collection):
            return "carry"
        for filter_, axis in self.variable_axes.items():
            if _matches(filter_, collection):
                # `In(axis)` only goes in, `Out(axis)` only comes out, a plain axis does both.
                is_plain = not isinstance(axis, In | Out)
                return _Axis(axis if is_plain else axis.axis, not isinstance(axis, Out), not isinstance(axis, In))
        return None

    def splits(self, name: str) -> bool | None:
        """Whether each step has its own key of this name; None if steps have no key of this name."""
        return next((split for filter_, split in self.split_rngs.items() if _matches(filter_, name)), None)


@dataclasses.dataclass(frozen=True)
class _Axis:
    axis: int
    goes_in: bool
    comes_out: bool


@dataclasses.dataclass(frozen=True)
class Lifted:
    """A module as a pure function (carried, given, *inputs) -> (results, carried, made).

    Attributes:
      run: the function.
      first: results of the first step, or their types.
      carried: the collections handed from one step to the next.
      given: keys and variables of each step, stacked along `given_axes`.
      made_axes: function from the collections made by steps to the axes they are stacked along.
      publish: writes the results of the scan, the last `carried` and the stacked `made`, into the module's scope.
    """

    run: Callable[..., tuple[Any, Any, Any]]
    first: Any
    carried: Any
    given: Any
    given_axes: Any
    made_axes: Callable[[Any], Any]
    publish: Callable[[Any, Any], None]


def lift(role: str, module: nn.Module, options: Lift, inputs: Sequence[Any], length: int) -> Lifted:
    """The pure function of a bound module.

    Args:
      role: the name of the module in errors, such as "the cell".
      module: a bound module, its variables and keys in `module.scope`.
      options: how collections and keys are treated.
      inputs: arguments of the first step, because Flax traces a step once beforehand and creates variables in it; their
        types suffice unless the module is being initialised.
      length: the number of steps.
    """
    return _Lifting(role, module, options, length).lifted(inputs)


class _Lifting:
    def __init__(self, role: str, module: nn.Module, options: Lift, length: int):
        self._name = f"{role} {type(module).__name__}"
        _check_owned(self._name, module, module)
        self._module = module
        self._scope = cast(Any, module.scope)
        self._pure, _ = module.unbind()
        self._options = options
        self._keys = {name: key for name, key in self._scope.rngs.items() if options.splits(name) is not None}
        # Cloned as in Flax, because JAX's check of key reuse would else count the split as a use of the scope's key.
        self._own_keys = {
            name: jax.tree.map(lambda leaf: jax.random.split(jax.random.clone(leaf), length), key)
            for name, key in self._keys.items()
            if options.splits(name)
        }
        # Number of draws from each key. Flax goes on counting from the step traced beforehand, so we do as well.
        self._counters: dict[Any, Any] = self._scope.rng_counters

    def lifted(self, inputs: Sequence[Any]) -> Lifted:
        own = self._taken(lambda kind: _is_axis(kind, "goes_in"))
        axes = self._axes(own)
        first_key = jax.tree.map(lambda leaf: leaf[0], self._own_keys)
        first = first_key, {name: _first(values, axes[name]) for name, values in own.items()}
        # To initialise, the step is run for the values of its variables; else tracing it counts its draws of keys.
        if self._module.is_initializing():
            results, mutated = self._run(self._taken(_is_shared), first, *inputs)
            self._put({name: value for name, value in mutated.items() if _is_shared(self._options.kind(name))})
        else:
            results, _ = jax.eval_shape(self._run, self._taken(_is_shared), first, *inputs)
        counters = _copy(self._counters)
        broadcast = self._taken(lambda kind: kind == "broadcast")

        def run(variables: Tree, given: Any, *inputs: Tree) -> Any:
            self._counters = _copy(counters)  # a step may be traced several times, and has to draw the same keys
            results, mutated = self._run({**broadcast, **variables}, given, *inputs)
            self._check_known(mutated, variables)
            kept = {name: mutated.get(name, value) for name, value in variables.items()}
            made = {n: value for n, value in mutated.items() if _is_axis(self._options.kind(n), "comes_out")}
            return results, kept, made

        own = self._taken(lambda kind: _is_axis(kind, "goes_in"))
        carried = self._taken(lambda kind: kind == "carry")
        return Lifted(run, results, carried, (self._own_keys, own), (0, self._axes(own)), self._axes, self._publish)

    def _taken(self, wanted: Callable[[Any], bool]) -> dict[str, Any]:
        """The module's collections of the wanted kinds."""
        return {name: values for name, values in self._module.variables.items() if wanted(self._options.kind(name))}

    def _axes(self, collections: Mapping[str, Any]) -> dict[str, int]:
        return {name: self._options.kind(name).axis for name in collections}

    def _run(self, variables: Tree, given: Any, *inputs: Tree) -> tuple[Any, dict[str, Any]]:
        """Runs one step in a scope of its own and returns (results, the collections it may change)."""
        own_keys, own_variables = given
        scope = Scope(
            unfreeze({**variables, **own_variables}),  # copied, because the scope writes into them
            rngs={**self._keys, **own_keys},
            name=self._scope.name,
            mutable=_Mutable(self._may_change, variables),
            path=self._scope.path,
            flags=self._scope.flags,
        )
        scope.rng_counters = self._counters
        with scope.temporary():
            results = self._pure.copy(parent=scope, name=self._scope.name)(*inputs)
            return results, dict(scope.mutable_variables())

    def _may_change(self, collection: str) -> bool:
        kind = self._options.kind(collection)
        if kind == "broadcast" and not self._module.is_initializing():
            return False
        return self._scope.is_mutable_collection(collection) and (_is_shared(kind) or _is_axis(kind, "comes_out"))

    def _check_known(self, mutated: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
        for name in mutated:
            if self._options.kind(name) == "carry" and name not in variables:
                raise ValueError(
                    f"{self._name} makes the collection {name!r} in its first step, but "
                    "variable_carry hands it from one step to the next, so it has to be there before: pass what `init` "
                    "returned."
                )

    def _publish(self, variables: Tree, made: Any) -> None:
        self._put({**variables, **made})
        _update(self._scope.rng_counters, self._counters)

    def _put(self, collections: Mapping[str, Mapping[str, Any]]) -> None:
        for collection, values in collections.items():
            if self._scope.is_mutable_collection(collection):
                for name, value in values.items():
                    self._module.put_variable(collection, name, value)


def _check_owned(name: str, owner: nn.Module, module: nn.Module) -> None:
    """Raises if `owner` has a module of another parent: its variables would be left behind, and new ones made."""
    own = cast(Any, owner.scope).path
    for field in dataclasses.fields(module):
        values = () if field.name in ("parent", "name") else getattr(module, field.name, ())
        for leaf in jax.tree.leaves(values, is_leaf=lambda leaf: isinstance(leaf, nn.Module)):
            if not isinstance(leaf, nn.Module) or leaf.scope is None:
                continue
            if leaf.scope.path[: len(own)] != own:
                raise NotImplementedError(
                    f"{name} has the module {'/'.join(leaf.scope.path)}, which belongs to a parent (made in its "
                    "__call__ or setup, or shared with it); bptt_jax.linen runs cells and heads that own their "
                    "modules: make it within the cell or head, or with parent=None."
                )
            _check_owned(name, owner, leaf)


class _Mutable(Collection[str]):
    """A filter of collections by predicate, because Flax's filters list names and a step may make up new ones."""

    def __init__(self, predicate: Callable[[str], bool], known: Iterable[str]):
        self._predicate = predicate
        self._known = [name for name in known if predicate(name)]

    def __contains__(self, collection: object) -> bool:
        return self._predicate(str(collection))

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def _is_shared(kind: Any) -> bool:
    return kind in ("broadcast", "carry")


def _is_axis(kind: Any, way: str) -> bool:
    return isinstance(kind, _Axis) and bool(getattr(kind, way))


def _first(tree: Tree, axis: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0)[0], tree)


def _matches(filter_: Any, name: str) -> bool:
    """Whether a filter of collections or keys, as Flax writes them, matches a name."""
    if isinstance(filter_, bool):
        return filter_
    if isinstance(filter_, str):
        return filter_ == name
    if isinstance(filter_, DenyList):
        return not _matches(filter_.deny, name)
    if isinstance(filter_, Iterable):
        return name in filter_
    raise TypeError(f"a filter must be a bool, a name, names or a DenyList, as in flax.linen.scan, got {filter_!r}.")


def _copy(counters: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in counters.items()}


def _update(counters: dict[Any, Any], new: Mapping[Any, Any]) -> None:
    """Updates counters in place, because Flax's scopes share them."""
    for key, value in new.items():
        if isinstance(value, Mapping):
            _update(counters.setdefault(key, {}), value)
        else:
            counters[key] = value
