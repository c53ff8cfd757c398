"""Training that survives being killed: it goes on from its last checkpoint and ends at the same loss, bit for bit.

A Flax GRU learns the adding problem of Hochreiter and Schmidhuber (1997): of a sequence of random numbers two are
marked, and their sum is asked for at the end; always answering 1 has a loss of 1/6. Gradients go through the whole
sequence, within a budget of bytes. Each batch is made of the seed and the number of its step, so that parameters, the
optimiser's state and the step are all there is to save. The same bits need the same machine and the same versions of
JAX and this library. The first command dies in the middle, the second finishes what it began:

    python examples/resumable.py --directory /tmp/adding --kill-at 230
    python examples/resumable.py --directory /tmp/adding
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

import bptt_jax

KEPT_CHECKPOINTS = 3


class State(NamedTuple):
    """All that a later step depends on, besides the options."""

    step: jax.Array  # updates done so far
    variables: Any
    optimizer: optax.OptState


class AddingModel(nn.Module):
    """The sum of the two marked numbers of each sequence."""

    width: int
    budget: str

    @nn.compact
    def __call__(self, xs: jax.Array) -> jax.Array:
        """(length, batch, 2) numbers and marks -> (batch,) sums."""
        hidden = bptt_jax.linen.RNN(nn.GRUCell(self.width), time_major=True, budget=self.budget, name="gru")(xs)
        return nn.Dense(1, name="sum")(hidden[-1])[:, 0]


def main() -> None:
    options = parse_options()
    console = Console()
    model = AddingModel(options.width, options.budget)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(options.learning_rate))
    init_key, train_key, test_key = jax.random.split(jax.random.key(options.seed), 3)

    def loss_of(variables: Any, batch_key: jax.Array) -> jax.Array:
        xs, sums = make_batch(batch_key, options.length, options.batch)
        return jnp.mean((model.apply(variables, xs) - sums) ** 2)

    @jax.jit
    def first_state() -> State:
        variables = model.init(init_key, make_batch(train_key, options.length, options.batch)[0])
        return State(jnp.int32(0), variables, optimizer.init(variables))

    @jax.jit
    def update(state: State) -> tuple[State, jax.Array]:
        batch_key = jax.random.fold_in(train_key, state.step)
        loss, gradient = jax.value_and_grad(loss_of)(state.variables, batch_key)
        change, optimizer_state = optimizer.update(gradient, state.optimizer)
        return State(state.step + 1, optax.apply_updates(state.variables, change), optimizer_state), loss

    with open_checkpoints(options) as checkpoints:
        state = restore(checkpoints, first_state(), options, console)
        state = train(update, state, checkpoints, options, console)
    loss = jax.jit(loss_of)(state.variables, test_key)
    console.print(f"loss on a held-out batch after {state.step} steps: {loss:.9g}")  # 9 digits determine a float32


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where checkpoints are, or will be")
    parser.add_argument("--steps", type=int, default=400, help="training steps in all (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--kill-at", type=int, metavar="STEP", help="after this step the process SIGKILLs itself")
    parser.add_argument("--length", type=int, default=500, help="numbers per sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sequences per step (default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="GRU features (default: %(default)s)")
    parser.add_argument("--budget", default="10%", help="of the GRU's backward pass (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of Adam (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("steps", "save_every", "batch", "width"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.kill_at is not None and not 1 <= options.kill_at <= options.steps:
        parser.error(f"--kill-at must be one of the {options.steps} steps, got {options.kill_at}")
    if options.length < 2:
        parser.error(f"--length must be at least 2, one number for each mark, got {options.length}")
    return options


def make_batch(key: jax.Array, length: int, batch: int) -> tuple[jax.Array, jax.Array]:
    """Inputs (length, batch, 2), numbers in [0, 1) and marks, one in each half; and the sums of the marked numbers."""
    numbers_key, first_key, second_key = jax.random.split(key, 3)
    numbers = jax.random.uniform(numbers_key, (length, batch))
    first = jax.random.randint(first_key, (batch,), 0, length // 2)
    second = jax.random.randint(second_key, (batch,), length // 2, length)
    marks = jax.nn.one_hot(first, length, axis=0) + jax.nn.one_hot(second, length, axis=0)
    return jnp.stack([numbers, marks], axis=-1), jnp.sum(numbers * marks, axis=0)


def open_checkpoints(options: argparse.Namespace) -> ocp.CheckpointManager:
    """The checkpoints in a directory, new or not, for this run only: with other options it would be another run."""
    run = {name: getattr(options, name) for name in ("length", "batch", "width", "budget", "learning_rate", "seed")}
    saving = ocp.CheckpointManagerOptions(
        save_decision_policy=policies.FixedIntervalPolicy(options.save_every),
        preservation_policy=policies.LatestN(KEPT_CHECKPOINTS),
        # A checkpoint is written beside its place and then renamed; what a killed run left half written is removed.
        cleanup_tmp_directories=True,
    )
    checkpoints = ocp.CheckpointManager(options.directory.resolve(), options=saving, metadata=run)
    saved = checkpoints.metadata().custom_metadata  # of the run that made the directory
    if saved != run:
        raise SystemExit(f"{options.directory} holds a run with {saved}; these options say {run}.")
    return checkpoints


def restore(checkpoints: ocp.CheckpointManager, state: State, options: argparse.Namespace, console: Console) -> State:
    """The state of the last checkpoint, or the given one if there is none."""
    step = checkpoints.latest_step()
    if step is None:
        return state
    if step > options.steps:
        raise SystemExit(f"{options.directory} is at step {step} already, beyond --steps {options.steps}.")
    console.print(f"resuming after step {step}")
    return checkpoints.restore(step, args=ocp.args.StandardRestore(state))


def train(
    update: Any, state: State, checkpoints: ocp.CheckpointManager, options: argparse.Namespace, console: Console
) -> State:
    """Takes the steps that are left and saves every few, in the background, and at the end."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    first = int(state.step) + 1
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=options.steps, completed=first - 1, loss="")
        for step in range(first, options.steps + 1):
            state, loss = update(state)
            checkpoints.save(step, args=ocp.args.StandardSave(state), force=step == options.steps)
            progress.update(task, advance=1, loss=f"loss {loss:.4f}")
            if step == options.kill_at:
                progress.stop()  # who is killed cannot give the terminal its cursor back
                os.kill(os.getpid(), signal.SIGKILL)
    return state


if __name__ == "__main__":
    main()
