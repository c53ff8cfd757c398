"""The place of time in an array: its axis, its direction, and for sequences of several lengths each one's own order.

With it, batch-major inputs, of a layer or of a `jax.vmap`, are read where they are. A block of steps is read at an
index, and only this block is brought into the order of a loop.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from bptt_jax._jaxprs.arrays import is_unknown
from bptt_jax._jaxprs.types import Index, Leaf, Tree


@dataclasses.dataclass(frozen=True)
class Along:
    """The place of a scan's steps in an array over time.

    Attributes:
      axis: the axis of time.
      flipped: whether the first step is at its end.
      batch_axes: None, or the axes of the batch, in the order of the axes of the sequences' lengths. Then each sequence
        is backwards, followed by its padding, which is backwards too.
    """

    axis: int = 0
    flipped: bool = False
    batch_axes: tuple[int, ...] | None = None

    @property
    def is_leading(self) -> bool:
        """Whether time is as in `jax.lax.scan`: the first axis, forwards."""
        return self == Along()

    def whole(self, array: Leaf, lengths: Leaf) -> Any:
        """All steps, time first."""
        return self.read(array, 0, array.shape[self.axis], lengths)

    def back(self, steps: Any, lengths: Leaf) -> Any:
        """The array with these steps as its `whole`."""
        array = jnp.moveaxis(steps, 0, self.axis)
        if not self.flipped and self.batch_axes is None:
            return array
        # A flip is its own inverse, of an axis as of each sequence and its padding.
        return jnp.moveaxis(self.whole(array, lengths), 0, self.axis)

    def is_sliced(self, is_cpu: bool) -> bool:
        """Whether parts of an array are taken by slices; otherwise by gathers.

        For a slice, XLA copies the whole array into the layout of the slice's reader, with time first. For a gather it
        does not (H100).
        """
        return is_cpu or self.axis == 0

    def read(self, array: Leaf, start: Index, n: int, lengths: Leaf, slices: bool = True) -> Any:
        """n steps from `start` on, time first.

        Args:
          array: the array.
          start, n: the first of the steps and their number.
          lengths: of the sequences; None where `batch_axes` is None.
          slices: see `is_sliced`.
        """
        if self.batch_axes is not None:
            return self._gathered(array, self._places(array, start, n, lengths))
        if n != array.shape[self.axis]:
            array = self._part(array, self._start(array, start, n), n, slices)
        steps = jnp.moveaxis(array, self.axis, 0)
        return jnp.flip(steps, 0) if self.flipped else steps

    def write(self, array: Leaf, steps: Any, start: Index, lengths: Leaf, slices: bool = True) -> Any:
        """The array with its steps from `start` on replaced by `steps`, time first. Arguments are as in `read`."""
        n = steps.shape[0]
        if n == array.shape[self.axis]:
            return self.back(steps, lengths)
        if self.batch_axes is not None:
            return self._scattered(array, steps, self._places(array, start, n, lengths))
        new = jnp.moveaxis(jnp.flip(steps, 0) if self.flipped else steps, 0, self.axis)
        start = self._start(array, start, n)
        if slices:
            return lax.dynamic_update_slice_in_dim(array, new, start, self.axis)
        places = (*[slice(None)] * self.axis, start + jnp.arange(n, dtype=jnp.int32))
        return array.at[places].set(new, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")

    def batched(self, dim: int | None, dim_of_lengths: int | None) -> Along:
        """The place of time with a batch axis inserted in the array at `dim`, and in the lengths at `dim_of_lengths`.

        None: no axis is inserted. Lengths with the new axis need an array with it.
        """
        if dim is None:
            return self
        axis, of_lengths = self.axis + (dim <= self.axis), self.batch_axes
        if of_lengths is not None:
            moved = [at + (dim <= at) for at in of_lengths]
            if dim_of_lengths is not None:
                moved.insert(dim_of_lengths, dim)
            of_lengths = tuple(moved)
        return Along(axis, self.flipped, of_lengths)

    def _start(self, array: Leaf, start: Index, n: int) -> Any:
        return array.shape[self.axis] - n - start if self.flipped else start

    def _part(self, array: Leaf, start: Index, n: int, slices: bool) -> Any:
        if slices:
            return lax.dynamic_slice_in_dim(array, start, n, self.axis)
        return jnp.take(array, start + jnp.arange(n, dtype=jnp.int32), self.axis, mode="clip")

    def _places(self, array: Leaf, start: Index, n: int, lengths: Leaf) -> Any:
        """The indices of n steps of each sequence: (n, *batch, 1)."""
        size = array.shape[self.axis]
        # Step t of a sequence of length L is at (size - 1 - t + L) mod size: at L - 1 - t for t < L, then padding.
        steps = start + jnp.arange(n, dtype=jnp.int32).reshape(n, *[1] * lengths.ndim)
        return ((size - 1 - steps + lengths[None]) % max(size, 1))[..., None]

    def _gathered(self, array: Leaf, places: Any) -> Any:
        batch, of_places, order = self._batching(array.ndim)
        numbers = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(places.ndim - 1, array.ndim)),
            collapsed_slice_dims=(self.axis,),
            start_index_map=(self.axis,),
            operand_batching_dims=batch,
            start_indices_batching_dims=of_places,
        )
        sizes = [1 if i in (self.axis, *batch) else size for i, size in enumerate(array.shape)]
        mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
        found = lax.gather(array, places, numbers, sizes, unique_indices=True, mode=mode)
        return lax.transpose(found, [order.index(i) for i in self._by_steps(array.ndim)])

    def _scattered(self, array: Leaf, steps: Any, places: Any) -> Any:
        batch, of_places, order = self._batching(array.ndim)
        numbers = lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(places.ndim - 1, array.ndim)),
            inserted_window_dims=(self.axis,),
            scatter_dims_to_operand_dims=(self.axis,),
            operand_batching_dims=batch,
            scatter_indices_batching_dims=of_places,
        )
        new = lax.transpose(steps, [self._by_steps(array.ndim).index(i) for i in order])
        mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
        return lax.scatter(array, places, new, numbers, unique_indices=True, mode=mode)

    def _batching(self, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
        """The batch axes in ascending order, the matching axes of `_places`, and the order of axes in a gathered array.

        They are batching dimensions of the gather, because with iotas as indices XLA would bring all shards of the
        batch to each device.
        """
        assert self.batch_axes is not None
        pairs = sorted(zip(self.batch_axes, range(1, len(self.batch_axes) + 1), strict=True))
        rest = [i for i in range(ndim) if i != self.axis and i not in self.batch_axes]
        return tuple(a for a, _ in pairs), tuple(b for _, b in pairs), [self.axis, *self.batch_axes, *rest]

    def _by_steps(self, ndim: int) -> list[int]:
        return [self.axis, *(i for i in range(ndim) if i != self.axis)]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The place of time in all arrays read and written by a scan.

    Attributes:
      xs, ys: an axis or an `Along`, or a pytree of these that begins like xs, and like ys. For ys, also a function from
        ys to one of these.
      lengths: the sequences' lengths, (*batch), for each `Along` with axes of a batch.
    """

    xs: Any = 0
    ys: Any = 0
    lengths: Any = None

    def of_xs(self, xs: Tree) -> list[Along]:
        """One `Along` for each leaf.

        Raises:
          ValueError: for axes that do not fit xs.
        """
        return _of_leaves(self.xs, xs, "in_axes", "xs")

    def has_unknown_length(self, xs: Tree, length: Any) -> bool:
        """Whether the number of steps is a symbol, as in `jax.export` for any length."""
        leaves = [leaf for leaf in jax.tree.leaves(xs) if any(map(is_unknown, np.shape(leaf)))]
        if not leaves and (length is None or not export.is_symbolic_dim(length)):
            return False
        sizes = [leaf.shape[along.axis] for leaf, along in zip(jax.tree.leaves(xs), self.of_xs(xs), strict=True)]
        return any(map(is_unknown, [*sizes, *([] if length is None else [length])]))

    def steps(self, xs: Tree, length: int | None) -> int:
        """The number of steps."""
        sizes = (np.shape(leaf)[of.axis] for leaf, of in zip(jax.tree.leaves(xs), self.of_xs(xs), strict=True))
        return int(next(sizes, 0 if length is None else length))

    def first(self, xs: Tree) -> Any:
        """xs with time first, for a scan without this library."""
        leaves, tree = jax.tree.flatten(xs)
        moved = [along.whole(leaf, self.lengths) for leaf, along in zip(leaves, self.of_xs(xs), strict=True)]
        return jax.tree.unflatten(tree, moved)

    def back(self, ys: Tree) -> Any:
        """ys of such a scan, with time in its place."""
        leaves, tree = jax.tree.flatten(ys)
        moved = [along.back(leaf, self.lengths) for leaf, along in zip(leaves, self.of_ys(ys), strict=True)]
        return jax.tree.unflatten(tree, moved)

    def of_ys(self, ys: Tree) -> list[Along]:
        """One `Along` for each leaf of ys, which have time first.

        Raises:
          ValueError: for axes that do not fit ys.
        """
        return _of_leaves(self.ys(ys) if callable(self.ys) else self.ys, ys, "out_axes", "ys")


TIME_FIRST = Layout()


def layout_of(in_axes: Tree, out_axes: Tree) -> Layout:
    """The layout of a call with these arguments."""
    is_first = all(type(axes) is int and axes == 0 for axes in (in_axes, out_axes))
    return TIME_FIRST if is_first else Layout(in_axes, out_axes)


def _of_leaves(axes: Any, tree: Tree, argument: str, name: str) -> list[Along]:
    found: list[tuple[Any, Any]] = []

    def add(axis: Any, part: Leaf) -> None:
        found.extend((axis, leaf) for leaf in jax.tree.leaves(part))

    try:
        jax.tree.map(add, axes, tree)
    except ValueError as error:
        raise ValueError(
            f"{argument} must be an int, or a pytree of ints that begins like {name}, got {axes!r} for {name} of the "
            f"structure {jax.tree.structure(tree)}."
        ) from error
    return [_along(axis, jnp.ndim(leaf), argument, name) for axis, leaf in found]


def _along(given: Tree, ndim: int, argument: str, name: str) -> Along:
    along = given if isinstance(given, Along) else Along(given)
    axis: Any = along.axis
    if isinstance(axis, bool | np.bool_) or not hasattr(axis, "__index__") or not -ndim <= axis < ndim:
        raise ValueError(f"{argument} has {axis!r} for a leaf of {name} with {ndim} axes; an axis of it is an int.")
    return dataclasses.replace(along, axis=operator.index(axis) % ndim)
