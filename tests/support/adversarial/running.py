"""Derivatives of a case with one scan and with another, compiled quickly."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from tests.support import comparison
from tests.support.steps import Case

Loss = Callable[[list[Any]], tuple[Any, Any]]

# What is compared are programs, not how well XLA makes them: this compiles in a quarter of the time.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@functools.cache
def quick_options() -> dict[str, Any]:
    """Those of the options that the installed XLA knows."""

    def is_known(name: str) -> bool:
        try:
            jax.jit(lambda: 0).lower().compile({name: _QUICK[name]})
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in _QUICK.items() if is_known(name)}


def run_each(*calls: tuple[Any, ...]) -> list[Any]:
    """The results of calls, given as (function, *arguments).

    While one function is traced, those before it are compiled beside it.
    """
    with ThreadPoolExecutor(2) as pool:
        compiled = [
            pool.submit(jax.jit(function).lower(*arguments).compile, quick_options()) for function, *arguments in calls
        ]
    return [program.result()(*arguments) for program, (_, *arguments) in zip(compiled, calls, strict=True)]


def derivative_call(
    derivative: Callable[[Loss, list[Any]], Any], case: Case, length: int, scan: Any
) -> tuple[Any, ...]:
    """A derivative of the loss of `comparison.make_loss`, for `run_each`."""
    loss, floats = comparison.make_loss(case, length, scan)
    return functools.partial(derivative, loss), floats


def gradient(loss: Loss, floats: list[Any]) -> Any:
    """(gradient, (loss, results))."""
    value, derivative = jax.value_and_grad(loss, has_aux=True)(floats)
    return derivative, value


def gradient_of_part(part: slice, loss: Loss, floats: list[Any]) -> list[Any]:
    """The gradient with respect to some of the inputs; the others are not differentiated."""

    def of_part(some: list[Any]) -> Any:
        return loss([*floats[: part.start], *some, *floats[part.stop :]])

    return jax.grad(of_part, has_aux=True)(floats[part])[0]


def directions(floats: list[Any]) -> list[Any]:
    return [jnp.cos(leaf) for leaf in floats]


def forward_over_reverse(loss: Loss, floats: list[Any]) -> Any:
    """(`gradient`, the derivative of the gradient along the directions)."""
    arguments = (floats,), (directions(floats),)
    derivative, change, value = jax.jvp(functools.partial(gradient, loss), *arguments, has_aux=True)
    return (derivative, value), change


def reverse_over_reverse(loss: Loss, floats: list[Any]) -> Any:
    """(`gradient`, the derivative of the gradient's component along the directions).

    Where the gradient is one, second derivatives are symmetric, and these are those of `forward_over_reverse` (products
    without conjugation make it so for complex numbers, too, for JAX returns the conjugates of complex gradients).
    """

    def component(floats: list[Any]) -> Any:
        first = gradient(loss, floats)
        along = zip(first[0], jax.lax.stop_gradient(directions(floats)), strict=True)
        return sum(jnp.sum(jnp.real(g * d), dtype=jnp.float64) for g, d in along), first

    transposed, first = jax.grad(component, has_aux=True)(floats)
    return first, transposed


def gradient_over_uneven_batch(case: Case, scan: Any) -> tuple[Any, ...]:
    """A batch of scans that differ only in those xs that have no derivative, for `run_each`."""
    floats, join = comparison.split(case, 6)

    def total(floats: list[Any]) -> Any:
        params, init, xs = join(floats)
        axes = jax.tree.map(lambda leaf: None if comparison.is_float(leaf) else 0, xs)
        rolled = jax.tree.map(
            lambda leaf: leaf if comparison.is_float(leaf) else jnp.stack([jnp.roll(leaf, i, 0) for i in range(6)]), xs
        )
        run = functools.partial(scan, functools.partial(case.step, params), init)
        results = jax.vmap(run, in_axes=(axes,))(rolled)
        leaves = filter(comparison.is_float, jax.tree.leaves(results))
        return sum(comparison.real_sum(jnp.sin(leaf) * comparison.distinct_weights(leaf)) for leaf in leaves)

    return jax.value_and_grad(total), floats
