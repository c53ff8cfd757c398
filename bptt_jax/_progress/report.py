"""Reports of steps done, from within a program: callbacks of `jax.debug` in its loops over blocks.

A report is made before a block, and says how many steps are done by then. It depends on the place in a loop only, so
under vmap there is one for all examples. A callback takes a millisecond or so on CPU, so a pass has some ten of them,
whatever its length, and most blocks of a long scan have none. In a `shard_map` the first device of the mesh reports.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.sharding import AxisType

from bptt_jax._figures import REPORTS
from bptt_jax._jaxprs.arrays import is_float
from bptt_jax._jaxprs.quiet import callbacks
from bptt_jax._jaxprs.types import Index, Leaf
from bptt_jax._progress import display
from bptt_jax._progress.display import Direction

_NEVER = -(2**30)  # in a count it stays negative


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """One pass through the steps of a scan, which reports if it has a label.

    Attributes:
      label: the name of its bar; None: nothing is reported, and nothing added to the program.
      direction: of the pass.
      length: its steps.
    """

    label: str | None
    direction: Direction
    length: int

    @property
    def every(self) -> int:
        """The steps between two reports."""
        return max(self.length // REPORTS, 1)

    def before(self, done: Index, n: int, after: Sequence[Any] = ()) -> None:
        """Reports the steps done before n more are run, if it is time.

        Args:
          done: the steps done: in a loop a traced int32, else an int.
          n: the steps to come before the next chance to report.
          after: outside of loops, arrays known by then, because XLA calls back as soon as it can.
        """
        if self.label is None:
            return
        if not isinstance(done, int):
            self.before_counted(_here(done), n)
        elif -done % self.every < n:
            self.before_counted(_here(_after(done, after)), self.every)

    def before_counted(self, done: Any, n: int) -> None:
        """Reports the steps done, if it is time, by a count from `count` on."""
        # Traced once for each n, because programs that evaluate steps again know callbacks by their function.
        key = min(n, self.every), jax.typeof(done)
        if key not in self._reports:
            self._reports[key] = jax.make_jaxpr(functools.partial(self._call_back, n=key[0]))(done)
        core.jaxpr_as_fun(self._reports[key])(done)

    def count(self) -> Any:
        """A count of no steps, to be increased by the program; negative on devices that are not to report."""
        return _here(jnp.int32(0))

    def end(self, after: Sequence[Any]) -> None:
        """Reports all steps as done, after some results are known."""
        self.before(self.length, self.length + 1, after)

    @property
    def names(self) -> set[Hashable]:
        """The names of its callbacks so far, as `quiet` takes them."""
        return set().union(*(callbacks(jaxpr.jaxpr.eqns) for jaxpr in self._reports.values()))

    @functools.cached_property
    def _reports(self) -> dict[tuple[int, Any], Any]:
        return {}

    def _call_back(self, done: Any, n: int) -> None:
        conditions = [-done % self.every < n] if n < self.every else []
        conditions += [done >= 0] if _manual_axes() else []
        if conditions:
            lax.cond(functools.reduce(jnp.logical_and, conditions), self._tell, lambda _: None, done)
        else:
            self._tell(done)

    def _tell(self, done: Any) -> None:
        jax.debug.callback(self.show, done)

    def show(self, done: Any) -> None:
        """Shows the steps done, at once."""
        assert self.label is not None
        display.report(self.label, self.direction, self.length, int(done))


def reporting_step(step: Callable[..., Any], progress: Pass, steps: Callable[[], int]) -> Callable[..., Any]:
    """A step that Python runs, under `jax.disable_jit`, with reports of its calls.

    Args:
      step: (carry, x) -> (carry, y).
      progress: of the scan; its length is not read.
      steps: a function to the number of steps, called at the first of them.
    """
    if progress.label is None:
        return step
    done = 0

    def run(carry: Any, x: Any) -> Any:
        nonlocal done
        known = dataclasses.replace(progress, length=steps())
        if done % known.every == 0:
            known.show(done)
        results = step(carry, x)
        done += 1
        if done == known.length:
            known.show(done)
        return results

    return run


SILENT = Pass(None, "forward", 0)


def _manual_axes() -> tuple[Any, ...]:
    """The axes of the mesh of a `shard_map` around a trace."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual)


def _here(done: Any) -> Any:
    """A number of steps, negative on all devices of a `shard_map` but the first."""
    axes = _manual_axes()
    return jnp.where(lax.axis_index(axes) == 0, done, _NEVER) if axes else done


def _after(done: int, arrays: Sequence[Any]) -> Any:
    """The number as an array that is not known before the first of some arrays is: a floating one, if there is any."""
    some = [leaf for leaf in arrays if leaf is not None and leaf.size]
    first = next((leaf for leaf in some if is_float(leaf)), some[0] if some else None)
    count = jnp.int32(done)
    return count if first is None else _known_after(count, _as_floats(lax.stop_gradient(first)))


def _as_floats(leaf: Leaf) -> Any:
    """An array as floats, which XLA does not know to be finite; keys as their data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return leaf if is_float(leaf) else leaf.astype(jnp.float32)


@jax.custom_batching.custom_vmap
def _known_after(count: Any, leaf: Leaf) -> Any:
    # Nothing is greater than infinity. The maximum is one number under any sharding.
    return count + (jnp.max(jnp.real(leaf)) > jnp.inf).astype(jnp.int32)


@_known_after.def_vmap
def _after_all_examples(_size: int, _is_batched: Any, count: Any, leaf: Leaf) -> tuple[Any, bool]:
    return _known_after(count, leaf), False


@jax.custom_batching.custom_vmap
def _of_one(count: Any) -> Any:
    """A count that is the same for all examples, and not batched: among the values kept for a gradient all are."""
    return count


@_of_one.def_vmap
def _of_the_first(_size: int, _is_batched: Any, count: Any) -> tuple[Any, bool]:
    return _of_one(count[0]), False


def marking_backward(passing: Pass, n: int) -> Callable[[list[Any], Any], list[Any]]:
    """An identity (arrays, count) -> arrays after n steps, whose cotangents report when they come by.

    The count is of the steps before these, from the start of the scan.
    """

    @jax.custom_vjp
    def mark(arrays: list[Any], count: Any) -> list[Any]:
        return arrays

    def backward(count: Any, cts: list[Any]) -> tuple[list[Any], None]:
        count = _of_one(count)
        passing.before_counted(jnp.where(count < 0, count, passing.length - n - count), n)
        return cts, None

    mark.defvjp(lambda arrays, count: (arrays, count), backward)
    return mark
