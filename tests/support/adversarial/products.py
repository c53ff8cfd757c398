"""Products and convolutions of every shape: which side the carry is on, what is contracted, what is shared."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.support.adversarial.table import adversary, draw, integers, weight


@adversary(lambda: None)
def carry_with_itself(params, h, x):
    h = jnp.tanh(0.3 * (h @ h.T) @ h + x)
    return h, h @ h.T


@adversary(init=lambda: draw(1, 3, 3, scale=0.5), xs=lambda n: draw(2, n, 3, 3))
def carry_on_both_sides_of_a_weight(w, h, x):
    h = jnp.tanh(h @ w @ h.T + x)
    return h, h


@adversary(
    lambda: {"l": draw(0, 2, 2, scale=0.5), "r": draw(3, 3, 3, scale=0.5)},
    xs=lambda n: (draw(2, n, 2, 2), draw(3, n, 3, 3), draw(4, n, 2, 3)),
)
def weights_and_xs_on_either_side(params, h, x):
    left, right, x = x
    h = jnp.tanh(left @ h @ right + params["l"] @ h @ params["r"] + params["l"] @ x + x @ params["r"])
    return h, h


@adversary(lambda: {"w": weight(), "v": draw(3, 3, 4), "u": draw(4, 2, 3)}, lambda: draw(1, 3), lambda n: draw(2, n, 4))
def vectors_without_a_batch(params, h, x):
    h = jnp.tanh(params["w"] @ h + h @ params["w"] + params["v"] @ x)
    return h, (jnp.dot(h, h), params["u"] @ h, jnp.dot(params["u"][0], h))


@adversary(lambda: draw(0, 3, 4, scale=0.5), lambda: draw(1, 3), lambda n: draw(2, n, 4))
def outer_products(w, h, x):
    """Contractions over nothing, of a carry and an x, and of a carry and a weight."""
    h = jnp.tanh(jnp.outer(h, x)[:, 0] + (jnp.outer(h, w[0]) * w) @ x)
    return h, jnp.outer(x, h)


@adversary(lambda: draw(0, 2, 3, 3, scale=0.5), lambda: draw(1, 4, 2, 3), lambda n: draw(2, n, 4, 2, 3))
def weights_per_head(w, h, x):
    h = jnp.tanh(jnp.einsum("bhi,hij->bhj", h, w) + jnp.einsum("bhi,hji->bhj", x, w))
    return h, h[:, 0]


@adversary(lambda: draw(0, 2, 3, 3, scale=0.5), lambda: draw(1, 3, 2, 4), lambda n: draw(2, n, 3, 2, 4))
def heads_in_the_middle(w, h, x):
    """The batch dimensions of the product lead in neither operand nor in the result."""
    h = jnp.tanh(jnp.einsum("ihb,jih->jhb", h, jnp.moveaxis(w, 0, 2)) + x)
    return h, h


@adversary(lambda: draw(0, 3, 2, 2, 3, scale=0.4), lambda: draw(1, 2, 3, 2), lambda n: draw(2, n, 2, 3, 2))
def several_contracting_dimensions(w, h, x):
    """Contracted in another order than they have in memory; and two products that share an operand."""
    z = lax.dot_general(h, w, (((2, 1), (1, 0)), ((), ())))
    u = lax.dot_general(w[:, :, 0], h, (((0, 1), (1, 2)), ((), ())))
    v = lax.dot_general(w[:, :, 1, :2], h, (((0, 1), (1, 2)), ((), ())))
    h = jnp.tanh(jnp.swapaxes(z, 1, 2) + x)
    return h, (u, v)


@adversary(lambda: draw(0, 3, 3, 3, scale=0.5))
def three_operands(w, h, x):
    h = jnp.tanh(jnp.einsum("bi,ijk,bj->bk", h, w, x))
    return h, h


@adversary(lambda: {"shared": weight(), "own": draw(3, 2, 3, 3, scale=0.5)})
def products_by_vmap(params, h, x):
    h = jnp.tanh(jax.vmap(lambda v: params["shared"] @ v)(h) + jax.vmap(jnp.matmul)(params["own"], h) + x)
    return h, h


@adversary(lambda: {"a": draw(0, 3, 4), "b": draw(3, 5, 3), "c": draw(4, 3, 3, scale=0.5)})
def shared_left_operand(params, h, x):
    """Other widths, one transposed, one used twice."""
    a, b, c = h @ params["a"], h @ params["b"].T, h @ params["c"]
    h = jnp.tanh(a[:, :3] * b[:, 2:] + c + (h + x) @ params["c"])
    return h, a + b[:, :4]


@adversary(
    lambda: {"a": draw(0, 4, 3), "b": draw(3, 5, 3), "c": draw(4, 3, 3, scale=0.5)},
    lambda: draw(1, 3, 2),
    lambda n: draw(2, n, 3, 2),
)
def shared_right_operand(params, h, x):
    a, b = params["a"] @ h, params["b"] @ h
    h = jnp.tanh(a[:3] * b[2:] + params["c"] @ h + params["c"] @ x)
    return h, a + b[1:]


@adversary(
    lambda: {"a": draw(0, 3, 2), "b": draw(3, 3, 3, scale=0.5)}, lambda: draw(1, 2, 4, 3), lambda n: draw(2, n, 2, 4, 3)
)
def shared_left_operand_of_three_dimensions(params, h, x):
    z = h @ params["a"]
    h = jnp.tanh(h @ params["b"] + x @ params["b"])
    return h, (z, x @ params["a"])


@adversary(lambda: {"a": weight(), "b": draw(3, 3, 3, scale=0.5)})
def shared_left_operand_and_shared_right(params, h, x):
    """The same weights times the carry and times x."""
    z = h @ params["a"] + x @ params["b"]
    h = jnp.tanh(h @ params["b"]) * jax.nn.sigmoid(z + x @ params["a"])
    return h, z


@adversary(lambda: {"a": weight(), "b": draw(3, 3, 3, scale=0.5)})
def shared_left_operand_with_made_weights(params, h, x):
    """Merged products of which one weight is given, one made from weights, one from x and one from the carry."""
    total = h @ params["a"] + h @ jnp.sin(params["b"]) + h @ (params["b"] * x[0]) + h @ (params["a"] * h[1])
    h = jnp.tanh(total + x)
    return h, h


INFINITE_DIAGONAL = np.diag(np.full(3, np.inf))


@adversary(lambda: {"w": weight(), "gate": draw(3, 3, 3)})
def shared_left_operand_with_one_that_only_decides(params, h, x):
    """A product without a derivative, with infinite weights: a zero times them in the backward pass would be NaN."""
    h = jnp.where(h @ (params["gate"] + INFINITE_DIAGONAL) > 3, jnp.tanh(h @ params["w"] + x), 0.5 * x)
    return h, h


@adversary(lambda: {"none": draw(3, 0, 3), "w": weight()}, xs=lambda n: (draw(2, n, 2, 0), draw(4, n, 2, 3)))
def contraction_over_no_entries(params, h, x):
    empty, x = x
    h = jnp.tanh(h @ params["w"] + empty @ params["none"] + x)
    return h, empty


@adversary(xs=lambda n: integers(2, 5, n, 2, 3))
def products_of_integers(w, h, x):
    counts = x @ jnp.arange(9).reshape(3, 3).astype(x.dtype)
    h = jnp.tanh(h @ w + 0.05 * counts.astype(h.dtype))
    return h, counts


@adversary()
def mixed_precisions_of_a_product(w, h, x):
    """Products that share the left operand but not the parameters of the operation."""
    h = jnp.tanh(jnp.dot(h, w, precision=lax.Precision.HIGHEST) + h @ w.T + x)
    return h, h


@adversary(
    lambda: {"w": weight(), "v": draw(3, 3, 3), "b": draw(4, 3)},
    lambda: draw(1, 1500, 3),
    lambda n: draw(2, n, 1500, 3),
)
def batch_that_is_large_against_the_weights(params, h, x):
    """To keep every step's cotangents would take more than to add the gradients up step by step."""
    h = jnp.tanh(h @ params["w"] + x @ params["v"] + params["b"])
    return h, h[0]


@adversary(
    lambda: {"w": weight(), "u": draw(3, 3, 1), "v": draw(4, 3, 3)},
    lambda: draw(1, 1500, 3),
    lambda n: draw(2, n, 1500, 3),
)
def batch_that_is_large_against_some_weights(params, h, x):
    """For one of the products it would not."""
    h = jnp.tanh(h @ params["w"] + (h * h) @ params["u"] + (x @ params["u"]) * (x @ params["v"]))
    return h, h[0]


def convolve(signal, kernel, **options):
    return lax.conv_general_dilated(signal, kernel, window_strides=(1,), padding="SAME", **options)


@adversary(lambda: draw(0, 2, 2, 3, scale=0.5), lambda: draw(1, 2, 2, 5), lambda n: draw(2, n, 2, 2, 5))
def convolution_of_carry_and_of_x(w, h, x):
    """And in groups."""
    h = jnp.tanh(convolve(h, w) + convolve(x, w, rhs_dilation=(2,)) + convolve(h, w[:, :1], feature_group_count=2))
    return h, h[:, 0]


@adversary(
    lambda: draw(0, 1, 1, 3, scale=0.5), lambda: (draw(1, 1, 1, 5), draw(3, 1, 1, 3)), lambda n: draw(2, n, 1, 1, 5)
)
def convolution_with_a_kernel_in_the_carry(w, carry, x):
    h, kernel = carry
    h = jnp.tanh(convolve(h, kernel) + convolve(x, kernel))
    return (h, jnp.tanh(kernel + w)), h
