"""The arithmetic floor: the time of a gradient if it were matrix products alone, at the rate of this device."""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp
from jax.extend.core import primitives

from bptt_jax._caches import remember
from bptt_jax._jaxprs.equations import inner_jaxprs
from bptt_jax._jaxprs.types import Eqn, Jaxpr

_CPU_SIDE, _ACCELERATOR_SIDE = 1024, 8192  # of the square matrices multiplied to find the rate
_TIMES = 9  # runs; the fastest counts


def product_flops(jaxpr: Jaxpr) -> int:
    """Floating-point operations of the products in a jaxpr (`jax.make_jaxpr`'s), two for each multiply-add.

    A loop counts as often as it runs, and a `cond` as its largest branch. A `while` counts as one trip, because the
    number of its trips is unknown.

    >>> import jax, jax.numpy as jnp
    >>> def f(w, x):
    ...     return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, 10)[0]
    >>> product_flops(jax.make_jaxpr(f)(jnp.ones((8, 8)), jnp.ones((2, 8))))  # 10 steps of 2·2·8·8
    2560
    """
    return sum(_flops_of(eqn) for eqn in jaxpr.eqns)


def _flops_of(eqn: Eqn) -> int:
    if eqn.primitive is primitives.dot_general_p:
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * int(eqn.outvars[0].aval.size) * math.prod(int(eqn.invars[0].aval.shape[axis]) for axis in contracted)
    if eqn.primitive is primitives.conv_general_dilated_p:
        kernel = eqn.invars[1].aval
        out_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * int(eqn.outvars[0].aval.size) * int(kernel.size // out_features)
    inner = [product_flops(jaxpr) for jaxpr in inner_jaxprs(eqn)]
    if eqn.primitive is primitives.cond_p:
        return max(inner, default=0)
    return int(eqn.params["length"]) * sum(inner) if eqn.primitive is primitives.scan_p else sum(inner)


@remember(64)
def product_rate(dtype: str = "float32") -> float:
    """Floating-point operations per second of a large matrix product on the default device, the best of 9 runs."""
    side = _CPU_SIDE if jax.default_backend() == "cpu" else _ACCELERATOR_SIDE
    product = jax.jit(jnp.matmul)
    square = jnp.ones((side, side), dtype)
    jax.block_until_ready(product(square, square))
    least = math.inf
    for _ in range(_TIMES):
        start = time.perf_counter()
        jax.block_until_ready(product(square, square))
        least = min(least, time.perf_counter() - start)
    return 2 * side**3 / least
