"""A byte-level language model trained on whole sequences of thousands of bytes, inside a byte budget.

A Flax LSTM reads the help texts that every Python carries (`pydoc_data.topics`) and predicts the next byte. Gradients
go through the whole of each sequence; the memory for that is bounded by the budget. The embedding of the bytes, the
logits and the loss are in the loop over the steps, so the budget covers them too, and no array but the text and the
losses is as long as the sequence. With `--loss-outside` the LSTM alone is in the loop.

At the end one training step with plain `flax.linen.RNN` is compiled beside it and both are measured: temporaries as XLA
reports them, and time.

    python examples/byte_lm.py --length 4000 --budget 5%
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
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


class EmbeddedLSTM(nn.RNNCellBase):
    """An LSTM cell that embeds the byte of its step."""

    width: int

    @nn.compact
    def __call__(self, carry: Any, byte: jax.Array) -> tuple[Any, jax.Array]:
        embedded = nn.Embed(VOCABULARY, self.width, name="embedding")(byte)
        return nn.OptimizedLSTMCell(self.width, name="lstm")(carry, embedded)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, batch: tuple[int, ...]) -> Any:
        return nn.OptimizedLSTMCell(self.width, parent=None).initialize_carry(rng, (*batch, self.width))

    num_feature_axes = 0


class NextByte(nn.Dense):
    """The head: cross entropy of the next byte, in bits, for the output of the LSTM at one step."""

    def __call__(self, hidden: jax.Array, following: jax.Array) -> jax.Array:
        return bits(super().__call__(hidden), following)


class LossInside(nn.Module):
    """A model with all it computes in the loop over the steps."""

    width: int
    budget: int | str

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """(length + 1, batch) bytes -> (length, batch) losses of the next byte, in bits."""
        cell, head = EmbeddedLSTM(self.width, name="cell"), NextByte(VOCABULARY, name="logits")
        rnn = bptt_jax.linen.RNN(cell, head=head, time_major=True, budget=self.budget)
        return rnn(text[:-1], head_inputs=text[1:])


class LossOutside(nn.Module):
    """The same model with the LSTM alone in the loop, by any layer class."""

    make_rnn: Callable[[nn.RNNCellBase], nn.Module]
    width: int

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """(length + 1, batch) bytes -> (length, batch) losses of the next byte, in bits."""
        embedded = nn.Embed(VOCABULARY, self.width, name="embedding")(text[:-1])
        hidden = self.make_rnn(nn.OptimizedLSTMCell(self.width, name="lstm"))(embedded)
        return bits(nn.Dense(VOCABULARY, name="logits")(hidden), text[1:])


def bits(logits: jax.Array, following: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, following) / jnp.log(2.0)


def loss_outside(params: Any) -> Any:
    """The parameters of `LossInside` as those of `LossOutside`; these are left as they are."""
    return {**params.get("cell", {}), **{name: values for name, values in params.items() if name != "cell"}}


def main() -> None:
    options = parse_options()
    console = Console()
    train, held_out = load_text(options.length)
    model = make_model(options)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(options.learning_rate))

    batches = random_batches(train, options.length, options.batch, options.seed)
    params = model.init(jax.random.key(options.seed), next(batches))["params"]
    state = (params, optimizer.init(params))
    update = compile_update(model, optimizer, state, next(batches))

    console.print(f"{len(train):,} bytes of text to train on, {held_out.size:,} held out; budget {options.budget}")
    before = bits_per_byte(model, params, held_out)
    state = train_model(update, state, batches, options.steps, console)
    after = bits_per_byte(model, state[0], held_out)
    console.print(f"held-out bits per byte: {before:.3f} before, [bold]{after:.3f}[/] after {options.steps} steps")

    plain = LossOutside(lambda cell: nn.RNN(cell, time_major=True), options.width)
    params = loss_outside(state[0])  # weights move from one model to the other
    plain_state = (params, optimizer.init(params))
    plain_update = compile_update(plain, optimizer, plain_state, next(batches))
    compare((plain_update, plain_state), (update, state), next(batches), options, console)


def make_model(options: argparse.Namespace) -> nn.Module:
    if not options.loss_outside:
        return LossInside(options.width, options.budget)
    return LossOutside(lambda cell: bptt_jax.linen.RNN(cell, time_major=True, budget=options.budget), options.width)


def parse_options(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2000, help="bytes per sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="LSTM features (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="training steps (default: %(default)s)")
    parser.add_argument("--budget", default="10%", help="of the loop's backward pass (default: %(default)s)")
    parser.add_argument("--loss-outside", action="store_true", help="embedding, logits and loss outside of the loop")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of Adam (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(given)
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


def loss_of(model: nn.Module, params: Any, text: jax.Array) -> jax.Array:
    """Mean cross entropy of the next byte, in bits."""
    return model.apply({"params": params}, text).mean()


def compile_update(model: nn.Module, optimizer: optax.GradientTransformation, state: Any, batch: np.ndarray) -> Any:
    """One training step, (state, batch) -> (state, loss), compiled."""

    def update(state: Any, text: jax.Array) -> Any:
        params, optimizer_state = state
        loss, gradient = jax.value_and_grad(lambda params: loss_of(model, params, text))(params)
        change, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(params, change), optimizer_state), loss

    return jax.jit(update).lower(state, batch).compile()


def bits_per_byte(model: nn.Module, params: Any, held_out: np.ndarray) -> float:
    return float(jax.jit(lambda params, text: loss_of(model, params, text))(params, held_out.astype(np.int32)))


def train_model(update: Any, state: Any, batches: Iterator[np.ndarray], steps: int, console: Console) -> Any:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss="")
        for _ in range(steps):
            state, loss = update(state, next(batches))
            progress.update(task, advance=1, loss=f"{float(loss):.3f} bits per byte")
    return state


def compare(theirs: Any, ours: Any, batch: np.ndarray, options: Any, console: Console) -> None:
    """Temporaries and time of a training step, (update, state), with plain `flax.linen.RNN` and with this library."""
    times: dict[str, list[float]] = {"flax": [], "bptt_jax": []}
    for _ in range(5):  # interleaved, so that both see the same machine
        for name, (update, state) in (("flax", theirs), ("bptt_jax", ours)):
            start = time.perf_counter()
            jax.block_until_ready(update(state, batch))
            times[name].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(times["flax"], times["bptt_jax"], strict=True))
    bytes_ = [program.memory_analysis().temp_size_in_bytes for program, _ in (theirs, ours)]

    inside = "The budget is for embedding, LSTM and loss; flax.linen.RNN also holds all logits, and their gradients."
    outside = "The budget is for the LSTM; both also hold the logits of all bytes, and their gradients."
    table = Table(
        title=f"One training step: {options.length} bytes x {options.batch}, LSTM of {options.width}",
        caption=outside if options.loss_outside else inside,
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
