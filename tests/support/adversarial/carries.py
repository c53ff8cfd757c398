"""What a step may do with its carry, its x and its outputs, without regard to products."""

import jax.numpy as jnp
from jax import lax

from tests.support.adversarial.table import adversary, batch, draw, inputs, integers, keys, weight


@adversary()
def ignores_its_carry(w, h, x):
    return jnp.tanh(x @ w), x.sum()


@adversary()
def ignores_x(w, h, x):
    h = jnp.tanh(h @ w)
    return h, h


@adversary()
def ignores_both(w, h, x):
    return jnp.sin(w[:2]), jnp.cos(w)


@adversary(lambda: {"w": weight(), "b": draw(3, 3)}, xs=lambda n: None)
def has_no_x(params, h, x):
    h = jnp.tanh(h @ params["w"] + params["b"])
    return h, None


@adversary(lambda: None, lambda: (), lambda n: inputs(n))
def has_no_carry(params, carry, x):
    return (), jnp.sin(x)


@adversary(init=lambda: {"h": batch(), "fixed": draw(3, 2, 3), "dead": draw(4, 2)})
def leaf_passed_on_unchanged(w, carry, x):
    """One of them in use, one not; both are outputs as well."""
    h = jnp.tanh(carry["h"] @ w + carry["fixed"] * x)
    return {**carry, "h": h}, (carry["fixed"], carry["dead"])


@adversary(init=lambda: (batch(), draw(3, 2, 3)))
def leaves_swapped(w, carry, x):
    a, b = carry
    return (b, jnp.tanh(a @ w + x)), b


@adversary(lambda: None, lambda: (batch(), draw(3, 2, 3)), lambda n: draw(2, n))
def leaves_only_swapped(params, carry, x):
    """Linear in x, and a permutation otherwise."""
    a, b = carry
    return (b, a), x * (a - b).sum()


@adversary(init=lambda: (draw(1, 2, 3), draw(3, 2, 3), draw(4, 2, 3)))
def shift_register(w, carry, x):
    """Each leaf is a later one's value, or x itself."""
    a, b, c = carry
    return (x, a, jnp.tanh(b @ w + c)), a * c


@adversary(init=lambda: (batch(), draw(3, 2, 3)))
def leaf_overwritten_by_a_function_of_x(w, carry, x):
    h, drive = carry
    return (jnp.tanh(h @ w + drive), jnp.sin(x) @ w), h


@adversary(init=lambda: (batch(), draw(3, 3, 3)))
def leaf_overwritten_by_a_weight(w, carry, x):
    h, used = carry
    return (jnp.tanh(h @ used + x), w), h


@adversary(xs=lambda n: (inputs(n), integers(3, 2, n, 2, dtype=bool), jnp.arange(n) < n - 2))
def reset_by_a_mask(w, h, x):
    """Sequences that follow each other, and padding at the end."""
    x, reset, valid = x
    new = jnp.tanh(jnp.where(reset[:, None], 0.0, h) @ w + x)
    h = jnp.where(valid, new, h)
    return h, jnp.where(valid, h, 0.0)


@adversary(init=lambda: (batch(), jnp.float64(0.0), jnp.int32(0)))
def running_statistics(w, carry, x):
    """A carry that depends on x and the count only, and another that depends on it."""
    h, mean, count = carry
    count = count + 1
    mean = mean + (x.mean() - mean) / count.astype(mean.dtype)
    h = jnp.tanh(h @ w + x - mean)
    return (h, mean, count), (h, count)


@adversary()
def straight_line_without_a_loop_dependence(w, h, x):
    """Linear: the same Jacobian in every step."""
    h = h @ w + x
    return h, h


@adversary(
    lambda: {"w": weight(), "out": draw(3, 3, 2)},
    lambda: {"h": batch(), "key": keys(5, impl="rbg"), "count": jnp.int32(0)},
    lambda n: {"x": inputs(n), "token": integers(4, 9, n)},
)
def outputs_of_every_kind(params, carry, x):
    h = jnp.tanh(carry["h"] @ params["w"] + x["x"])
    outputs = {
        "carry": carry["h"],
        "new carry": h,
        "x": x["x"],
        "of x": jnp.sin(x["x"]),
        "weight": params["out"],
        "of weights": jnp.sin(params["out"] @ params["out"].T),
        "hoistable product": x["x"] @ params["out"],
        "product": h @ params["out"],
        "integer": x["token"] + carry["count"],
        "bool": h > 0,
        "key": carry["key"],
        "constant": jnp.ones(2),
        "number": 2.5,
        "empty": jnp.zeros((0, 2)),
    }
    return {**carry, "h": h, "count": carry["count"] + 1}, outputs


@adversary(xs=lambda n: {"pixels": integers(2, 256, n, 2, 3, dtype=jnp.uint8), "on": integers(3, 2, n, dtype=bool)})
def integers_and_bools(w, h, x):
    """Nothing differentiable among the xs."""
    pixels = x["pixels"].astype(h.dtype) / 255
    h = jnp.tanh(h @ w + jnp.where(x["on"], pixels, -pixels))
    return h, (x["pixels"] // 2, ~x["on"])


@adversary()
def sorted_and_summed_up(w, h, x):
    h = jnp.tanh(jnp.cumsum(jnp.sort(h @ w, axis=1), axis=1) + jnp.sort(jnp.cumsum(x, axis=0), axis=1) @ w)
    return h, jnp.argsort(h, axis=1)


@adversary()
def largest_entry(w, h, x):
    best, of_x = jnp.argmax(h, axis=1), jnp.argmax(x, axis=1)
    h = jnp.tanh(h @ w + jnp.take_along_axis(x, best[:, None], 1) + w[of_x])
    return h, (best, of_x, lax.top_k(h, 2))


@adversary()
def literals_on_either_side(w, h, x):
    """Operations that differ in the order of a number and an array only."""
    h = jnp.tanh((1 - h) @ w + (h - 1) @ w.T + 0.1 * (2 / (2 + x**2)) + 0.1 * (2 + x**2) / 2)
    return h, (jnp.less(0.5, h), h < 0.5, jnp.less(0.5, x), x < 0.5, x - 0.5, 0.5 - x)


@adversary(xs=lambda n: (inputs(n), integers(3, 3, n)))
def written_at_an_index(w, h, x):
    x, at = x
    h = h.at[:, at].set(jnp.tanh(h @ w + x)[:, 0]).at[0].add(x[1])
    return h, h[:, at]


@adversary()
def double_where(w, h, x):
    """Square roots of negative numbers, of x and of the carry, that no result and no gradient sees."""

    def root(v):
        return jnp.where(v > 0, jnp.sqrt(jnp.where(v > 0, v, 1.0)), 0.0)

    h = jnp.tanh(root(h) @ w + root(x) @ w - 0.2)
    return h, root(h)


@adversary()
def cond_around_not_a_number(w, h, x):
    """Of a `cond` one branch runs. Where both do and one result is selected, the gradient is NaN: zero times the
    derivative of a square root at zero.
    """

    def never(v):
        return lax.cond(v[0, 0] > 1e9, lambda v: jnp.sqrt(0 * v), jnp.sin, v)

    h = jnp.tanh(never(h) @ w + never(x) @ w)
    return h, h
