"""A recurrent network trained on all devices of all processes, each with its part of the batch, inside a byte budget.

The task is to add: of a sequence of random numbers two are marked, and after the last one their sum is asked for. The
gradient goes through the whole sequence. Weights are on every device; the batch is divided under explicit sharding, so
the budget is bytes of a device. At the end one training step with plain `flax.linen.RNN` is compiled beside it.

    python examples/data_parallel.py --devices 4
    python examples/data_parallel.py --processes 2 --devices 2

On CPU a process makes as many devices as `--devices` says; on accelerators it uses those that it finds. With
`--processes` it starts that many on this machine, and ends them.
"""

import argparse
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import bptt_jax

WHOLE, TIME_MAJOR, BY_BATCH = PartitionSpec(), PartitionSpec(None, "batch"), PartitionSpec("batch")


class Adder(nn.Module):
    """An LSTM over a sequence and a number made of its last state; a budget of None is Flax's own layer."""

    width: int
    budget: str | int | None

    @nn.compact
    def __call__(self, xs: jax.Array, carry: Any) -> jax.Array:
        """(length, batch, 2) numbers and marks, and a first carry -> (batch,) sums."""
        options: dict[str, Any] = {"time_major": True, "return_carry": True, "name": "layer"}
        cell = nn.LSTMCell(self.width, parent=None)
        if self.budget is None:
            layer = nn.RNN(cell, **options)
        else:
            layer = bptt_jax.linen.RNN(cell, budget=self.budget, **options)
        (_, hidden), _ = layer(xs, initial_carry=carry)
        return nn.Dense(1, name="sum")(hidden)[:, 0]


def main() -> None:
    options = parse_options()
    if options.processes > 1 and options.process is None:
        sys.exit(run_processes(options))
    jax.config.update("jax_num_cpu_devices", options.devices)
    if options.processes > 1:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    try:
        train_and_compare(options)
    finally:
        if options.processes > 1:
            jax.distributed.shutdown()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="processes to start (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=2, help="of a process, on CPU (default: %(default)s)")
    parser.add_argument("--length", type=int, default=200, help="numbers in a sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step, of all (default: %(default)s)")
    parser.add_argument("--width", type=int, default=32, help="LSTM features (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: %(default)s)")
    parser.add_argument("--budget", default="10%", help="of the LSTM on a device (default: %(default)s)")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.budget.isdigit():
        options.budget = int(options.budget)
    for name in ("processes", "devices", "length", "batch", "width", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def run_processes(options: argparse.Namespace) -> int:
    """Starts the processes of a job on this machine, and waits for them; the first status that is not 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", coordinator, "--process"]
    processes = [subprocess.Popen([*command, str(i)]) for i in range(options.processes)]
    try:
        return next(filter(None, [process.wait() for process in processes]), 0)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train_and_compare(options: argparse.Namespace) -> None:
    if options.batch % jax.device_count():
        raise SystemExit(f"--batch {options.batch} cannot be divided among {jax.device_count()} devices.")
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Explicit,))
    console = Console(quiet=jax.process_index() != 0)
    console.print(f"{jax.device_count()} devices of {jax.process_count()} processes; budget {options.budget}")
    with jax.set_mesh(mesh):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
        batches = random_batches(options, mesh)
        state = first_state(optimizer, options, mesh)
        update = compile_update(Adder(options.width, options.budget), optimizer, state, next(batches))
        plain = compile_update(Adder(options.width, None), optimizer, state, next(batches))
        for step in range(options.steps):
            state, loss = update(state, next(batches))
            if step % 10 == 0 or step == options.steps - 1:
                console.print(f"step {step:4d}  mean squared error {float(loss):.4f}")
    console.print(table_of({"flax.linen.RNN": plain, f"bptt_jax, budget {options.budget}": update}, options))


def random_batches(options: argparse.Namespace, mesh: Any) -> Iterator[Any]:
    """Endless batches (xs, first carry, sums), of which each device is given its part only."""
    random = np.random.default_rng(0)  # the same in all processes, which keep what their devices need

    def place(array: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda part: array[part])

    while True:
        numbers = random.random((options.length, options.batch), np.float32)
        marks = np.zeros_like(numbers)
        half = options.length // 2
        rows = np.arange(options.batch)
        marks[random.integers(0, max(half, 1), options.batch), rows] = 1
        marks[random.integers(half, options.length, options.batch), rows] = 1
        zeros = place(np.zeros((options.batch, options.width), np.float32), BY_BATCH)
        xs = place(np.stack([numbers, marks], axis=-1), TIME_MAJOR)
        yield xs, (zeros, zeros), place(np.sum(numbers * marks, axis=0), BY_BATCH)


def first_state(optimizer: optax.GradientTransformation, options: argparse.Namespace, mesh: Any) -> Any:
    """Variables and the optimiser's state, whole on every device."""
    xs, carry = jnp.zeros((1, 1, 2)), (jnp.zeros((1, options.width)),) * 2
    whole = NamedSharding(mesh, WHOLE)
    variables = jax.device_put(Adder(options.width, None).init(jax.random.key(0), xs, carry), whole)
    return variables, jax.tree.map(lambda leaf: jax.device_put(leaf, whole), optimizer.init(variables))


def compile_update(model: nn.Module, optimizer: optax.GradientTransformation, state: Any, batch: Any) -> Any:
    """One training step, (state, batch) -> (state, loss), compiled."""

    def loss_of(variables: Any, batch: Any) -> jax.Array:
        xs, carry, sums = batch
        return jnp.mean(jnp.square(model.apply(variables, xs, carry) - sums))

    def update(state: Any, batch: Any) -> Any:
        variables, optimizer_state = state
        loss, gradient = jax.value_and_grad(loss_of)(variables, batch)
        change, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(variables, change), optimizer_state), loss

    return jax.jit(update).lower(state, batch).compile()


def table_of(updates: dict[str, Any], options: argparse.Namespace) -> Table:
    """Bytes of a training step on each device, as XLA reports them."""
    table = Table(title=f"One training step on each device: {options.length} numbers x {options.batch}, of all devices")
    for column in ("", "temporaries", "arguments"):
        table.add_column(column, justify="left" if not column else "right")
    for name, update in updates.items():
        sizes = update.memory_analysis()
        bytes_ = (sizes.temp_size_in_bytes, sizes.argument_size_in_bytes)
        table.add_row(name, *(f"{size / 2**10:,.0f} KiB" for size in bytes_))
    return table


if __name__ == "__main__":
    main()
