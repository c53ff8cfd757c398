"""A byte-level language model trained on whole sequences of thousands of bytes, inside a byte budget.

A Flax LSTM reads the help texts that every Python carries (`pydoc_data.topics`) and predicts the next byte. Gradients
go through the whole of each sequence; the memory for that is bounded by the budget. At the end one training step with
plain `flax.linen.RNN` is compiled beside it and both are measured: temporaries as XLA reports them, and time.

    python examples/byte_lm.py --length 4000 --budget 5%
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pydoc_data import topics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import bptt_jax

VOCABULARY = 256


class ByteModel(nn.Module):
    """Logits of the next byte after each byte of a sequence."""

    make_rnn: Callable[[nn.RNNCellBase], nn.Module]
    width: int

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """(length, batch) bytes -> (length, batch, 256) logits."""
        embedded = nn.Embed(VOCABULARY, self.width, name="embedding")(text)
        hidden = self.make_rnn(nn.OptimizedLSTMCell(self.width, name="lstm"))(embedded)
        return nn.Dense(VOCABULARY, name="logits")(hidden)


def main() -> None:
    options = parse_options()
    console = Console()
    train, held_out = load_text(options.length)
    model = ByteModel(lambda cell: bptt_jax.linen.RNN(cell, time_major=True, budget=options.budget), options.width)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(options.learning_rate))

    batches = random_batches(train, options.length, options.batch, options.seed)
    variables = model.init(jax.random.key(options.seed), next(batches)[:-1])
    state = (variables, optimizer.init(variables))
    update = compile_update(model, optimizer, state, next(batches))

    console.print(f"{len(train):,} bytes of text to train on, {held_out.size:,} held out; budget {options.budget}")
    before = bits_per_byte(model, variables, held_out)
    state = train_model(update, state, batches, options.steps, console)
    after = bits_per_byte(model, state[0], held_out)
    console.print(f"held-out bits per byte: {before:.3f} before, [bold]{after:.3f}[/] after {options.steps} steps")

    plain = ByteModel(lambda cell: nn.RNN(cell, time_major=True), options.width)
    compare(update, compile_update(plain, optimizer, state, next(batches)), state, next(batches), options, console)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2000, help="bytes per sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="LSTM features (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="training steps (default: %(default)s)")
    parser.add_argument("--budget", default="10%", help="of the LSTM's backward pass (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of Adam (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.budget.isdigit():
        options.budget = int(options.budget)
    for name in ("length", "batch", "width", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def load_text(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Python's help texts as bytes: all but the last part to train on, and held-out sequences of `length` + 1."""
    text = np.frombuffer("\n".join(topics.topics.values()).encode("utf-8", "replace"), np.uint8)
    count = max(1, text.size // 10 // (length + 1))
    if text.size < (count + 2) * (length + 1):
        raise SystemExit(f"--length {length} is too long for a text of {text.size} bytes; at most {text.size // 4}.")
    at = text.size - count * (length + 1)
    return text[:at], text[at:].reshape(count, length + 1).T


def random_batches(text: np.ndarray, length: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of shape (length + 1, batch), cut out of the text at random."""
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, text.size - length, batch)
        yield np.stack([text[start : start + length + 1] for start in starts], axis=1).astype(np.int32)


def loss_of(model: nn.Module, variables: Any, text: jax.Array) -> jax.Array:
    """Mean cross entropy of the next byte, in bits."""
    logits = model.apply(variables, text[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[1:]).mean() / jnp.log(2.0)


def compile_update(model: nn.Module, optimizer: optax.GradientTransformation, state: Any, batch: np.ndarray) -> Any:
    """One training step, (state, batch) -> (state, loss), compiled."""

    def update(state: Any, text: jax.Array) -> Any:
        variables, optimizer_state = state
        loss, gradient = jax.value_and_grad(lambda v: loss_of(model, v, text))(variables)
        change, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(variables, change), optimizer_state), loss

    return jax.jit(update).lower(state, batch).compile()


def bits_per_byte(model: nn.Module, variables: Any, held_out: np.ndarray) -> float:
    return float(jax.jit(lambda v, text: loss_of(model, v, text))(variables, held_out.astype(np.int32)))


def train_model(update: Any, state: Any, batches: Iterator[np.ndarray], steps: int, console: Console) -> Any:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss="")
        for _ in range(steps):
            state, loss = update(state, next(batches))
            progress.update(task, advance=1, loss=f"{float(loss):.3f} bits per byte")
    return state


def compare(ours: Any, theirs: Any, state: Any, batch: np.ndarray, options: Any, console: Console) -> None:
    """Temporaries and time of a training step with this library and with plain `flax.linen.RNN`, side by side."""
    times: dict[str, list[float]] = {"flax": [], "bptt_jax": []}
    for _ in range(5):  # interleaved, so that both see the same machine
        for name, update in (("flax", theirs), ("bptt_jax", ours)):
            start = time.perf_counter()
            jax.block_until_ready(update(state, batch))
            times[name].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(times["flax"], times["bptt_jax"], strict=True))
    bytes_ = [program.memory_analysis().temp_size_in_bytes for program in (theirs, ours)]

    table = Table(
        title=f"One training step: {options.length} bytes x {options.batch}, LSTM of {options.width}",
        caption="The budget is for the LSTM; both also hold the logits of all bytes, and their gradients.",
    )
    table.add_column("")
    table.add_column("temporaries", justify="right")
    table.add_column("time per step", justify="right")
    rows = zip(("flax.linen.RNN", f"bptt_jax, budget {options.budget}"), bytes_, times.values(), strict=True)
    for name, size, seconds in rows:
        table.add_row(name, f"{size / 2**20:.1f} MiB", f"{statistics.median(seconds):.3f} s")
    table.add_row("ratio", f"{bytes_[1] / bytes_[0]:.1%}", f"{ratio:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
