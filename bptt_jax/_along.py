"""Where time is in an array: along which axis, in which direction, and of sequences of several lengths each one's own.

So a layer's batch-major inputs, and those of a `jax.vmap`, are read where they are: a block of steps at an index, of
which only the block is brought into the order that a loop wants.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Along:
    """Where the steps of a scan are in an array over time.

    Attributes:
      axis: that of time.
      flipped: whether the first step is at its end.
      lengths: None; or, of an array with axes of a batch, where these are, in the order in which the array of the
        sequences' lengths has them. Each sequence is backwards then, and its padding behind it, backwards too.
    """

    axis: int = 0
    flipped: bool = False
    lengths: tuple[int, ...] | None = None

    @property
    def is_leading(self) -> bool:
        """Whether time is as `jax.lax.scan` has it."""
        return self == Along()

    def whole(self, array: Any, lengths: Any) -> Any:
        """All steps, time first."""
        return self.read(array, 0, array.shape[self.axis], lengths)

    def back(self, steps: Any, lengths: Any) -> Any:
        """The array whose `whole` these steps are: to be brought into this order twice changes nothing."""
        array = jnp.moveaxis(steps, 0, self.axis)
        return array if self._is_moved_only else jnp.moveaxis(self.whole(array, lengths), 0, self.axis)

    @property
    def _is_moved_only(self) -> bool:
        return not self.flipped and self.lengths is None

    def read(self, array: Any, start: Any, n: int, lengths: Any, slices: bool = True) -> Any:
        """n steps from `start` on, time first.

        Args:
          array: the array.
          start, n: which steps.
          lengths: of the sequences; None where `self.lengths` is.
          slices: whether to slice, or else to gather.
        """
        if self.lengths is not None:
            places = self._places(array, start, n, lengths)
            found = array.at[places].get(mode="promise_in_bounds", unique_indices=True)
            return lax.transpose(found, self._order(array.ndim))
        if n != array.shape[self.axis]:
            array = self._part(array, self._start(array, start, n), n, slices)
        steps = jnp.moveaxis(array, self.axis, 0)
        return jnp.flip(steps, 0) if self.flipped else steps

    def write(self, array: Any, steps: Any, start: Any, lengths: Any, slices: bool = True) -> Any:
        """The array with steps from `start` on replaced; these have time first. The arguments are those of `read`."""
        n = steps.shape[0]
        if n == array.shape[self.axis]:
            return self.back(steps, lengths)
        if self.lengths is not None:
            order = self._order(array.ndim)
            new = lax.transpose(steps, [order.index(i) for i in range(array.ndim)])
            places = self._places(array, start, n, lengths)
            return array.at[places].set(new, mode="promise_in_bounds", unique_indices=True)
        new = jnp.moveaxis(jnp.flip(steps, 0) if self.flipped else steps, 0, self.axis)
        start = self._start(array, start, n)
        if slices:
            return lax.dynamic_update_slice_in_dim(array, new, start, self.axis)
        places = (*[slice(None)] * self.axis, start + jnp.arange(n, dtype=jnp.int32))
        return array.at[places].set(new, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")

    def batched(self, dim: int | None, dim_of_lengths: int | None) -> Along:
        """The same for an array with an axis more, and one of lengths with one more: None where there is none.

        Of an array without that axis the lengths may not have it.
        """
        if dim is None:
            return self
        axis, of_lengths = self.axis + (dim <= self.axis), self.lengths
        if of_lengths is not None:
            moved = [at + (dim <= at) for at in of_lengths]
            if dim_of_lengths is not None:
                moved.insert(dim_of_lengths, dim)
            of_lengths = tuple(moved)
        return Along(axis, self.flipped, of_lengths)

    def _start(self, array: Any, start: Any, n: int) -> Any:
        return array.shape[self.axis] - n - start if self.flipped else start

    def _part(self, array: Any, start: Any, n: int, slices: bool) -> Any:
        if slices:
            return lax.dynamic_slice_in_dim(array, start, n, self.axis)
        return jnp.take(array, start + jnp.arange(n, dtype=jnp.int32), self.axis, mode="clip")

    def _places(self, array: Any, start: Any, n: int, lengths: Any) -> tuple[Any, ...]:
        """Where the steps of each sequence are: an index whose arrays have the axes (time, *batch)."""
        assert self.lengths is not None
        size, axes = array.shape[self.axis], lengths.ndim + 1
        steps = start + jnp.arange(n, dtype=jnp.int32).reshape(n, *[1] * lengths.ndim)
        found: list[Any] = [slice(None)] * array.ndim
        found[self.axis] = (size - 1 - steps + lengths[None]) % max(size, 1)
        for i, at in enumerate(self.lengths, start=1):
            found[at] = lax.broadcasted_iota(jnp.int32, tuple(array.shape[at] if j == i else 1 for j in range(axes)), i)
        return tuple(found)

    def _order(self, ndim: int) -> list[int]:
        """From the axes of what `_places` index to (time, *others in the array's order).

        NumPy puts the axes of index arrays where the first of these is if they are neighbours, else in front.
        """
        assert self.lengths is not None
        indexed = [self.axis, *self.lengths]
        first = min(indexed) if max(indexed) - min(indexed) < len(indexed) else 0
        rest = [i for i in range(ndim) if i not in indexed]
        found = [*rest[:first], *indexed, *rest[first:]]
        return [found.index(i) for i in (self.axis, *(i for i in range(ndim) if i != self.axis))]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where time is in all that a scan reads and writes.

    Attributes:
      xs, ys: an axis or an `Along`, or a pytree of them that begins like xs, and like ys; or, of ys, a function from
        them to that.
      lengths: the sequences' lengths, for those `Along`s that have some.
    """

    xs: Any = 0
    ys: Any = 0
    lengths: Any = None

    def of_xs(self, xs: Any) -> list[Along]:
        """One `Along` for each leaf.

        Raises:
          ValueError: for axes that do not fit xs.
        """
        return _of_leaves(self.xs, xs, "in_axes", "xs")

    def first(self, xs: Any) -> Any:
        """xs with time first."""
        leaves, tree = jax.tree.flatten(xs)
        moved = [along.whole(leaf, self.lengths) for leaf, along in zip(leaves, self.of_xs(xs), strict=True)]
        return jax.tree.unflatten(tree, moved)

    def back(self, ys: Any) -> Any:
        """ys, with time where it is to be, from those with time first."""
        leaves, tree = jax.tree.flatten(ys)
        moved = [along.back(leaf, self.lengths) for leaf, along in zip(leaves, self.of_ys(ys), strict=True)]
        return jax.tree.unflatten(tree, moved)

    def of_ys(self, ys: Any) -> list[Along]:
        """One `Along` for each leaf of ys, which have time first.

        Raises:
          ValueError: for axes that do not fit ys.
        """
        return _of_leaves(self.ys(ys) if callable(self.ys) else self.ys, ys, "out_axes", "ys")


TIME_FIRST = Layout()


def layout_of(in_axes: Any, out_axes: Any) -> Layout:
    """The layout of a call with these arguments."""
    return Layout(in_axes, out_axes) if (in_axes, out_axes) != (0, 0) else TIME_FIRST


def _of_leaves(axes: Any, tree: Any, argument: str, name: str) -> list[Along]:
    found: list[tuple[Any, Any]] = []

    def add(axis: Any, part: Any) -> None:
        found.extend((axis, leaf) for leaf in jax.tree.leaves(part))

    try:
        jax.tree.map(add, axes, tree)
    except ValueError as error:
        raise ValueError(
            f"{argument} must be an int, or a pytree of ints that begins like {name}, got {axes!r} for {name} of the "
            f"structure {jax.tree.structure(tree)}."
        ) from error
    return [_along(axis, jnp.ndim(leaf), argument, name) for axis, leaf in found]


def _along(given: Any, ndim: int, argument: str, name: str) -> Along:
    along = given if isinstance(given, Along) else Along(given)
    axis = along.axis
    if isinstance(axis, bool) or not isinstance(axis, int) or not -ndim <= axis < ndim:
        raise ValueError(f"{argument} has {axis!r} for a leaf of {name} with {ndim} axes; an axis of it is an int.")
    return dataclasses.replace(along, axis=axis % ndim)
