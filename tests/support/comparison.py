"""The one comparison that matters: this library against `jax.lax.scan`, under every transformation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bptt_jax
from bptt_jax.errors import BudgetError
from tests.support.steps import Case

Scan = Callable[..., tuple[Any, Any]]


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)


def real_sum(leaf: Any) -> Any:
    """The sum of the real and imaginary parts of a float leaf, in double precision."""
    return jnp.sum(jnp.real(leaf) + jnp.imag(leaf), dtype=jnp.float64)


def distinct_weights(leaf: Any) -> Any:
    return jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)


def split(case: Case, length: int) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The float leaves of (params, init, xs), and how to put them back among the others."""
    leaves, tree = jax.tree.flatten((case.params, case.init, case.xs(length)))
    floats = [leaf for leaf in leaves if is_float(leaf)]

    def join(floats: list[Any]) -> Any:
        left = iter(floats)
        return jax.tree.unflatten(tree, [next(left) if is_float(leaf) else leaf for leaf in leaves])

    return floats, join


def make_loss(case: Case, length: int, scan: Scan) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """A smooth scalar of all float results, as a function of all float inputs; and those inputs.

    The parameters are closed over by the step, so under a transformation they are tracers.
    """
    floats, join = split(case, length)

    def loss(floats: list[Any]) -> Any:
        params, init, xs = join(floats)
        result = scan(lambda carry, x: case.step(params, carry, x), init, xs, length=length)
        weighed = [
            real_sum(jnp.sin(leaf)) * ((i + 1.0) * 3.0 / max(leaf.size, 1))
            for i, leaf in enumerate(jax.tree.leaves(result))
            if is_float(leaf)
        ]
        return sum(weighed), result

    return loss, floats


def value_and_grad(loss: Any, floats: list[Any]) -> Any:
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)


def smallest_budget(case: Case, length: int, derivative: Callable[..., Any] = value_and_grad, **options: Any) -> int:
    """The smallest budget that the error for a budget of one byte names; 1 if that is enough."""
    try:
        derivative(*make_loss(case, length, functools.partial(bptt_jax.scan, budget=1, **options)))
    except BudgetError as error:
        return error.smallest_bytes
    return 1


def in_smallest_budget(run: Callable[[int], Any], budget: int = 1) -> tuple[Any, int]:
    """`run` of a budget, or of the smallest above it that all gradients fit, as errors name it; and that budget."""
    while True:
        try:
            return run(budget), budget
        except BudgetError as error:
            if error.smallest_bytes <= budget:
                raise
            budget = error.smallest_bytes


def eager_grad(loss: Any, floats: list[Any]) -> Any:
    return jax.grad(loss, has_aux=True)(floats)


def vmapped_grad(loss: Any, floats: list[Any]) -> Any:
    batch = [jnp.stack([leaf, 0.5 * leaf, -leaf]) for leaf in floats]
    return jax.jit(jax.vmap(jax.grad(loss, has_aux=True)))(batch)


def grad_of_vmap(loss: Any, floats: list[Any], is_batched: Callable[[int], bool], size: int) -> Any:
    """Value and gradient of a scalar of the results of a batch of scans, which share the inputs not batched."""
    axes = [0 if is_batched(i) else None for i in range(len(floats))]
    scales = jnp.linspace(0.5, 1.0, size)
    inputs = [
        leaf if axis is None else jax.vmap(lambda s, leaf=leaf: leaf * s.astype(leaf.dtype))(scales)
        for leaf, axis in zip(floats, axes, strict=True)
    ]

    def total(inputs: list[Any]) -> Any:
        results = jax.vmap(lambda floats: loss(floats)[1], in_axes=(axes,))(inputs)
        # Every entry has a weight of its own, so that none can be exchanged for another unnoticed.
        leaves = [leaf for leaf in jax.tree.leaves(results) if is_float(leaf)]
        return sum(real_sum(jnp.sin(leaf) * distinct_weights(leaf)) for leaf in leaves)

    return jax.jit(jax.value_and_grad(total))(inputs)


def jvp(loss: Any, floats: list[Any]) -> Any:
    return jax.jit(lambda f: jax.jvp(lambda f: loss(f)[0], (f,), ([jnp.cos(leaf) for leaf in f],)))(floats)


def forward_over_reverse(loss: Any, floats: list[Any]) -> Any:
    grad = jax.grad(lambda f: loss(f)[0])
    return jax.jit(lambda f: jax.jvp(grad, (f,), ([jnp.cos(leaf) for leaf in f],)))(floats)


def reverse_over_reverse(loss: Any, floats: list[Any]) -> Any:
    grad = jax.grad(lambda f: loss(f)[0])
    return jax.jit(jax.grad(lambda f: sum(jnp.vdot(g, jnp.cos(g)) for g in grad(f))))(floats)


DERIVATIVES = (value_and_grad, eager_grad, vmapped_grad, jvp, forward_over_reverse, reverse_over_reverse)


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    """Equal structure, shapes and dtypes; floats within `tolerance` of the largest in the leaf, the rest exactly."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if is_float(a):
            scale = max(1.0, float(np.max(np.abs(b), initial=0.0)))
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)
        else:
            np.testing.assert_array_equal(a, b)
