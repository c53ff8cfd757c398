"""More than one floating type in a step, and complex numbers."""

import jax.numpy as jnp
from jax import lax

from tests.support.adversarial.table import adversary, batch, draw, inputs, weight

F32, BF16 = jnp.float32, jnp.bfloat16


def dot_in_single(a, b):
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=F32)


@adversary(
    lambda: {"w": weight().astype(F32), "v": draw(3, 3, 3, dtype=F32)},
    lambda: batch().astype(BF16),
    lambda n: inputs(n).astype(BF16),
    tolerance=3e-2,
)
def bfloat16_carry(params, h, x):
    """Weights kept in single precision, cast in the step; the products accumulate in single precision."""
    z = dot_in_single(h, params["w"].astype(BF16)) + dot_in_single(x, params["v"].astype(BF16))
    return jnp.tanh(z).astype(BF16), z


@adversary(lambda: weight().astype(BF16), lambda: batch().astype(F32), lambda n: inputs(n).astype(BF16), tolerance=3e-2)
def single_carry_with_bfloat16_weights(w, h, x):
    h = jnp.tanh(dot_in_single(h.astype(BF16), w) + dot_in_single(x, w))
    return h, h.astype(BF16)


@adversary(lambda: {"w": weight(), "v": draw(3, 3, 3, dtype=F32)}, tolerance=1e-5)
def single_product_in_a_double_step(params, h, x):
    """Products that share the left operand but not the types."""
    narrow = h.astype(F32) @ params["v"] + x.astype(F32) @ params["w"].astype(F32)
    h = jnp.tanh(h @ params["w"] + narrow.astype(h.dtype) + x)
    return h, narrow


@adversary(
    lambda: weight().astype(F32), lambda: (batch().astype(F32), jnp.float64(0.0)), lambda n: inputs(n).astype(F32),
    tolerance=1e-5,
)  # fmt: skip
def double_sum_of_single_steps(w, carry, x):
    h, total = carry
    h = jnp.tanh(h @ w + x)
    return (h, total + h.sum(dtype=total.dtype)), total


def complex_draw(seed, *shape, scale=1.0):
    return lax.complex(draw(seed, *shape, scale=scale), draw(seed + 100, *shape, scale=scale))


@adversary(
    lambda: complex_draw(0, 3, 3, scale=0.4),
    lambda: complex_draw(1, 2, 3),
    lambda n: complex_draw(2, n, 2, 3),
)
def complex_weights(w, h, x):
    z = h @ w + x @ w.conj().T
    h = z / (1 + jnp.abs(z))
    return h, (jnp.real(h), jnp.abs(x))


@adversary(lambda: {"re": weight(), "im": draw(3, 3, 3, scale=0.5)})
def complex_products_of_real_inputs(params, h, x):
    """A unitary-like recurrence between real arrays: all derivatives exist."""
    z = lax.complex(h, x) @ lax.complex(params["re"], params["im"])
    h = jnp.tanh(jnp.real(z * jnp.conj(z)) - jnp.imag(z))
    return h, jnp.imag(z)
