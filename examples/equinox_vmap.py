"""An Equinox model written for one example, mapped over a batch with `jax.vmap`, inside a byte budget.

An LSTM reads a sequence of vectors and is asked for the sum of their first numbers, divided by the root of the length.
The batch goes into the step of the scan, so all examples together keep the budget, and the gradient of the weights is
summed where it is made. Before training, the gradient's temporaries are shown, as XLA reports them: with
`jax.lax.scan`, and with this library without and with a budget.

    python examples/equinox_vmap.py --batch 16 --budget 10%
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import bptt_jax

FEATURES = 16


class Model(eqx.Module):
    """From one sequence (length, 16) to a number; `scan` is `jax.lax.scan` or one like it."""

    cell: eqx.nn.LSTMCell
    readout: eqx.nn.Linear
    scan: Callable[..., Any] = eqx.field(static=True)

    def __init__(self, width: int, scan: Callable[..., Any], key: jax.Array):
        cell_key, readout_key = jax.random.split(key)
        self.cell = eqx.nn.LSTMCell(FEATURES, width, key=cell_key)
        self.readout = eqx.nn.Linear(width, "scalar", key=readout_key)
        self.scan = scan

    def __call__(self, xs: jax.Array) -> jax.Array:
        zeros = jnp.zeros(self.cell.hidden_size)
        (hidden, _), _ = self.scan(lambda carry, x: (self.cell(x, carry), None), (zeros, zeros), xs)
        return self.readout(hidden)


def loss_of(model: Model, xs: jax.Array, sums: jax.Array) -> jax.Array:
    return jnp.mean((jax.vmap(model)(xs) - sums) ** 2)


def main() -> None:
    options = parse_options()
    xs = jax.random.normal(jax.random.key(0), (options.batch, options.length, FEATURES))
    sums = xs[:, :, 0].sum(1) / options.length**0.5
    scans = {
        "jax.lax.scan": jax.lax.scan,
        "bptt_jax.scan": bptt_jax.scan,
        f"bptt_jax.scan, {options.budget}": functools.partial(bptt_jax.scan, budget=options.budget),
    }
    for name, scan in scans.items():
        model = Model(options.width, scan, jax.random.key(1))
        compiled = jax.jit(jax.value_and_grad(loss_of)).lower(model, xs, sums).compile()
        print(f"{name}: {compiled.memory_analysis().temp_size_in_bytes:,} bytes of temporaries")

    optimizer = optax.adam(1e-3)  # the last model, within the budget, is trained
    state = optimizer.init(model)
    for step in range(options.steps):
        loss, gradient = compiled(model, xs, sums)
        print(f"step {step}: mean squared error {loss:.4f}")
        change, state = optimizer.update(gradient, state)
        model = optax.apply_updates(model, change)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="examples (default: %(default)s)")
    parser.add_argument("--length", type=int, default=100, help="vectors in a sequence (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="LSTM features (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="training steps (default: %(default)s)")
    parser.add_argument("--budget", default="20%", help="of the scan's gradient, all examples (default: %(default)s)")
    options = parser.parse_args()
    if options.budget.isdigit():
        options.budget = int(options.budget)
    for name in ("batch", "length", "width", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


if __name__ == "__main__":
    main()
