"""The one comparison that matters: this library against `jax.lax.scan`, under every transformation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.steps import Case

Scan = Callable[..., tuple[Any, Any]]


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)


def real_sum(leaf: Any) -> Any:
    """The sum of the real and imaginary parts of a float leaf, in double precision."""
    return jnp.sum(jnp.real(leaf) + jnp.imag(leaf), dtype=jnp.float64)


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


def eager_grad(loss: Any, floats: list[Any]) -> Any:
    return jax.grad(loss, has_aux=True)(floats)


def vmapped_grad(loss: Any, floats: list[Any]) -> Any:
    batch = [jnp.stack([leaf, 0.5 * leaf, -leaf]) for leaf in floats]
    return jax.jit(jax.vmap(jax.grad(loss, has_aux=True)))(batch)


def jvp(loss: Any, floats: list[Any]) -> Any:
    return jax.jit(lambda f: jax.jvp(lambda f: loss(f)[0], (f,), ([jnp.cos(leaf) for leaf in f],)))(floats)


def forward_over_reverse(loss: Any, floats: list[Any]) -> Any:
    grad = jax.grad(lambda f: loss(f)[0])
    return jax.jit(lambda f: jax.jvp(grad, (f,), ([jnp.cos(leaf) for leaf in f],)))(floats)


def reverse_over_reverse(loss: Any, floats: list[Any]) -> Any:
    grad = jax.grad(lambda f: loss(f)[0])
    return jax.jit(jax.grad(lambda f: sum(jnp.vdot(g, jnp.cos(g)) for g in grad(f))))(floats)


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
