"""Kinds of steps that are audited, as shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.support.random_steps import random_step


@dataclasses.dataclass(frozen=True)
class Problem:
    """A step to audit: (params, carry, x) -> (carry, y), with abstract arrays."""

    step: Callable[..., Any]
    params: Any
    init: Any
    x: Any

    def without_outputs(self) -> Problem:
        return dataclasses.replace(self, step=lambda *given: (self.step(*given)[0], None))

    def of_type(self, dtype: Any) -> Problem:
        """With all arrays of this type."""
        params, init, x = jax.tree.map(lambda leaf: shape(*leaf.shape, dtype=dtype), (self.params, self.init, self.x))
        return Problem(self.step, params, init, x)

    def xs(self, length: int) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape), leaf.dtype), self.x)


def shape(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _cell(cell: nn.RNNCellBase, *x_shape: int) -> Problem:
    x = shape(*x_shape)
    carry = jax.eval_shape(lambda: cell.initialize_carry(jax.random.key(0), x.shape))
    params = jax.eval_shape(cell.init, jax.random.key(1), carry, x)
    return Problem(cell.apply, params, carry, x)


def _stacked() -> Problem:
    """Two layers of LSTM, the outputs of one being the inputs of the other."""
    lower, upper = _cell(nn.LSTMCell(64), 8, 32), _cell(nn.LSTMCell(96), 8, 64)

    def step(params: Any, carry: Any, x: Any) -> Any:
        below, hidden = lower.step(params[0], carry[0], x)
        above, y = upper.step(params[1], carry[1], hidden)
        return (below, above), y

    return Problem(step, (lower.params, upper.params), (lower.init, upper.init), lower.x)


def _attention() -> Problem:
    """A state that attends at each step over a memory that the carry hands on unchanged."""
    batch, places, width = 4, 32, 64

    def step(params: Any, carry: Any, x: Any) -> Any:
        state, memory = carry
        scores = jnp.einsum("bw,bpw->bp", state @ params["query"], memory) * width**-0.5
        read = jnp.einsum("bp,bpw->bw", jax.nn.softmax(scores), memory)
        state = jnp.tanh(jnp.concatenate([read, x], -1) @ params["mix"] + state)
        return (state, memory), state @ params["out"]

    params = {"query": shape(width, width), "mix": shape(2 * width, width), "out": shape(width, width)}
    return Problem(step, params, (shape(batch, width), shape(batch, places, width)), shape(batch, width))


def _waves() -> Problem:
    """The sine-Gordon equation u_tt = c² Δu − sin u on a grid, c being learnt, in double precision."""
    side, f64 = 48, jnp.float64

    def step(params: Any, carry: Any, x: Any) -> Any:
        u, before = carry
        around = jnp.pad(u, 1)
        laplacian = around[2:, 1:-1] + around[:-2, 1:-1] + around[1:-1, 2:] + around[1:-1, :-2] - 4 * u
        after = 2 * u - before + params * laplacian - 0.01 * jnp.sin(u)
        after = after.at[side // 2, side // 2].add(x)
        return (after, u), after[:, 0]

    u = shape(side, side, dtype=f64)
    return Problem(step, shape(side, side, dtype=f64), (u, u), shape(dtype=f64))


def _tiny() -> Problem:
    """No weights and a carry of 256 bytes, beside which the counters of loops are not small."""
    carry = shape(64)
    return Problem(lambda params, carry, x: (jnp.tanh(0.9 * carry + x),) * 2, (), carry, carry)


def _wide() -> Problem:
    """A residual network as the step, with weights and products that are wider than the carry."""
    weights = [shape(32, 128), shape(128, 128), shape(128, 32)]

    def step(params: Any, carry: Any, x: Any) -> Any:
        hidden = carry
        for weight in params:
            hidden = jnp.tanh(hidden @ weight)
        return carry + hidden * x, carry

    return Problem(step, weights, shape(16, 32), shape(16, 32))


def _mixed() -> Problem:
    """A GRU that computes in bfloat16, with weights, carry and inputs in float32."""
    cell = _cell(nn.GRUCell(64, dtype=jnp.bfloat16), 8, 32)

    def step(params: Any, carry: Any, x: Any) -> Any:
        after, y = cell.step(params, carry, x)
        return after.astype(carry.dtype), y

    return dataclasses.replace(cell, step=step)


def _readout() -> Problem:
    """A GRU with logits in the step, which are wider than the carry."""
    cell = _cell(nn.GRUCell(32), 8, 32)

    def step(params: Any, carry: Any, x: Any) -> Any:
        carry, y = cell.step(params[0], carry, x)
        return carry, y @ params[1]

    return dataclasses.replace(cell, step=step, params=(cell.params, shape(32, 512)))


KINDS: dict[str, Callable[[], Problem]] = {
    "lstm": lambda: _cell(nn.LSTMCell(128), 16, 128),
    "gru": lambda: _cell(nn.GRUCell(96), 8, 64),
    "stacked": _stacked,
    "convlstm": lambda: _cell(nn.ConvLSTMCell(8, (3, 3)), 2, 12, 12, 4),
    "attention": _attention,
    "waves": _waves,
    "narrow": lambda: _cell(nn.GRUCell(16), 32, 1),
    "wide": _wide,
    "tiny": _tiny,
    "bfloat16": lambda: _cell(nn.LSTMCell(64), 8, 32).of_type(jnp.bfloat16),
    "mixed": _mixed,
    "readout": _readout,
}
RANDOM = "random"  # with a seed, as "random-7": one more kind of step


def group(kind: str) -> str:
    """What a kind is listed under."""
    return kind.partition("-")[0]


def problem_of(kind: str) -> Problem:
    """The problem of a kind, or of a random one."""
    if group(kind) != RANDOM:
        return KINDS[kind]()
    drawn = random_step(int(kind.removeprefix(f"{RANDOM}-")))
    params, init, xs = jax.eval_shape(lambda: (drawn.params, drawn.init, drawn.xs(1)))
    return Problem(drawn.step, params, init, jax.tree.map(lambda leaf: shape(*leaf.shape[1:], dtype=leaf.dtype), xs))
