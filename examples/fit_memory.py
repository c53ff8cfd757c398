"""A training step fitted to a limit: two Flax layers and Adam, with the largest budget that leaves room for the rest.

The task is to repeat: random symbols come first, then a pause, and then they are asked for again. The gradient goes
through the whole sequence. The limit counts weights, Adam's state, the batch, logits and the layers' temporaries;
`bptt_jax.largest_budget` compiles the training step up to four times to find the budget for the layers.

    python examples/fit_memory.py --within 15MiB
    python examples/fit_memory.py --within auto --length 20000 --width 256
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import bptt_jax

SYMBOLS, PAUSE, LAYERS = 16, 0, 2


class Repeater(nn.Module):
    """Logits of the symbol to repeat after each symbol of a sequence; the layers share a budget."""

    budget: int | None
    width: int

    @nn.compact
    def __call__(self, symbols: jax.Array) -> jax.Array:
        """(length, batch) symbols -> (length, batch, SYMBOLS) logits."""
        hidden = nn.Embed(SYMBOLS, self.width)(symbols)
        part = bptt_jax.linen.share_budget(self.budget, LAYERS)
        for _ in range(LAYERS):
            hidden = bptt_jax.linen.RNN(nn.GRUCell(self.width), time_major=True, budget=part)(hidden)
        return nn.Dense(SYMBOLS)(hidden)


def main() -> None:
    options = parse_options()
    console = Console(soft_wrap=True, highlight=False)
    optimizer, batches = optax.adam(options.learning_rate), random_batches(options)
    make = training_step(optimizer, options.width)
    variables = Repeater(None, options.width).init(jax.random.key(options.seed), next(batches)[0])
    state = (variables, optimizer.init(variables))
    try:
        budget, report = bptt_jax.largest_budget(make, state, next(batches), within=options.within)
    except ValueError as error:  # a malformed limit, or one that is too small
        raise SystemExit(f"--within: {error}") from None
    console.print(str(report))

    update = report.chosen.compiled  # make(budget) is the same, and would be compiled again
    for step in range(1, options.steps + 1):
        state, loss = update(state, next(batches))
        if step in (1, options.steps) or step % 10 == 0:
            console.print(f"step {step}: loss {float(loss):.3f}, with a budget of {budget:,} bytes")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--within", default="15MiB", help="bytes, or auto (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1000, help="symbols in a sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="features of a layer (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="training steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of Adam (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, least in {"length": 3, "batch": 1, "width": 1, "steps": 1}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if options.within.isdigit():
        options.within = int(options.within)
    return options


def random_batches(options: argparse.Namespace) -> Iterator[np.ndarray]:
    """Endless pairs of symbols and symbols asked for, (2, length, batch): both are PAUSE for most of the time."""
    random, asked = np.random.default_rng(options.seed), max(options.length // 20, 1)
    while True:
        batch = np.full((2, options.length, options.batch), PAUSE, np.int32)
        batch[0, :asked] = batch[1, -asked:] = random.integers(1, SYMBOLS, (asked, options.batch))
        yield batch


def training_step(optimizer: optax.GradientTransformation, width: int) -> Callable[[int | None], Any]:
    """From a budget to one training step, (state, batch) -> (state, loss), jitted; the state is overwritten."""

    def make(budget: int | None) -> Any:
        model = Repeater(budget, width)

        def loss_of(variables: Any, batch: jax.Array) -> jax.Array:
            logits = model.apply(variables, batch[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        def update(state: Any, batch: jax.Array) -> Any:
            variables, moments = state
            loss, gradient = jax.value_and_grad(loss_of)(variables, jnp.asarray(batch))
            change, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(variables, change), moments), loss

        return jax.jit(update, donate_argnums=0)

    return make


if __name__ == "__main__":
    main()
