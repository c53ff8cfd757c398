"""Neural-guided, bidirectional program search: train a recurrent policy through whole episodes inside a memory budget.

python -m examples.bidirectional_search train --domain double-and-add --arm bidirectional --seed 0
python -m examples.bidirectional_search train --domain double-and-add --arm forward --encoding msb
python -m examples.bidirectional_search train --domain game24 --arm bidirectional --updates 1250 --reinforce 200
python -m examples.bidirectional_search long --bits 128 --truncate
python -m examples.bidirectional_search abstract --rounds 1
python -m examples.bidirectional_search memory --lengths 2048 40000
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.bidirectional_search import long_version, memory
from examples.bidirectional_search.abstraction import abstract
from examples.bidirectional_search.domains.arc import symmetry_tasks
from examples.bidirectional_search.domains.grids import abstraction_primitives
from examples.bidirectional_search.experiments import DOMAINS, SPLITS, Experiment, baselines, solved, train
from examples.bidirectional_search.games import ENCODINGS
from examples.bidirectional_search.training import Log, Settings, save

CONSOLE = Console()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    options.run(options)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m examples.bidirectional_search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(required=True, metavar="train|long|abstract|memory")
    one = commands.add_parser("train", help="one arm on one domain, and what it solves")
    one.set_defaults(run=run_train)
    one.add_argument("--domain", choices=DOMAINS, default="double-and-add")
    one.add_argument("--arm", choices=["forward", "bidirectional"], default="bidirectional")
    one.add_argument("--encoding", choices=ENCODINGS, default="append")
    one.add_argument(
        "--updates", type=positive, default=282, help="two epochs of double-and-add (default: %(default)s)"
    )
    one.add_argument("--reinforce", type=int, default=0, help="updates by REINFORCE after that (default: %(default)s)")
    one.add_argument("--sampled", action="store_true", help="held-out rollouts are sampled and not greedy")
    one.add_argument("--entropy", type=float, default=0.0, help="weight of the entropy (default: %(default)s)")
    one.add_argument("--directory", type=Path, help="for a checkpoint")
    long = commands.add_parser("long", help="targets of K bits: full against truncated backpropagation")
    long.set_defaults(run=run_long)
    long.add_argument("--bits", type=positive, nargs="+", default=[128], help="one after another, as a curriculum")
    long.add_argument("--updates", type=positive, default=350, help="for each (default: %(default)s)")
    long.add_argument("--truncate", action="store_true", help=f"backpropagation through {long_version.WINDOW} tokens")
    for command in (one, long):
        command.add_argument("--features", type=positive, default=64)
        command.add_argument("--batch", type=positive, default=32)
        command.add_argument("--learning-rate", type=float, default=3e-3)
        command.add_argument("--budget", default="12MiB", help="of the reader's backward pass (default: %(default)s)")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--log", type=Path, help="for metrics, as lines of JSON")
    abstract = commands.add_parser("abstract", help="abstractions from solved ARC tasks")
    abstract.set_defaults(run=run_abstract)
    abstract.add_argument("--rounds", type=positive, default=1)
    abstract.add_argument("--candidates", type=positive, default=20_000, help="of each task (default: %(default)s)")
    table = commands.add_parser("memory", help="temporaries of the training step by the length of the episode")
    table.set_defaults(run=run_memory)
    table.add_argument("--lengths", type=positive, nargs="+", default=[2_500, 10_000, 40_000], help="tokens")
    table.add_argument("--budget", default="16MiB")
    return whole


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def settings_of(options: argparse.Namespace, **more: object) -> Settings:
    return Settings(
        batch=options.batch,
        features=options.features,
        learning_rate=options.learning_rate,
        budget=options.budget,
        seed=options.seed,
        **more,
    )


def run_train(options: argparse.Namespace) -> None:
    experiment = Experiment(
        options.domain,
        options.arm == "bidirectional",
        options.encoding,
        options.updates,
        settings_of(options, entropy=options.entropy),
        options.reinforce,
    )
    log = Log(options.log, CONSOLE)
    trainer, arena, state = train(experiment, log)
    table = Table("held-out tasks", "policy", "random", "constant logits", title=f"{options.domain}, {options.arm}")
    for split in SPLITS[options.domain]:
        tasks = arena.domain.held_out(split)
        rate = solved(trainer, arena, state, tasks, options.seed, not options.sampled)
        nothing = baselines(arena.domain, experiment.bidirectional, tasks, options.seed)
        log.write(stage="held out", split=split, policy=rate, **nothing)
        rates = (f"{value:.1%}" for value in (rate, *nothing.values()))
        table.add_row(f"{split or 'all'} ({len(tasks)})", *rates)
    CONSOLE.print(table)
    if options.directory is not None:
        save(options.directory, state, options.updates + options.reinforce)


def run_long(options: argparse.Namespace) -> None:
    settings = settings_of(options, horizon=options.bits[-1], truncate=options.truncate)
    stages = [(bits, options.updates) for bits in options.bits]
    _, accuracy = long_version.train(stages, settings, Log(options.log, CONSOLE))
    kind = f"through {long_version.WINDOW} tokens" if options.truncate else "through all tokens"
    CONSOLE.print(f"K={options.bits[-1]}, backpropagation {kind}: {accuracy:.1%} of held-out decisions")


def run_abstract(options: argparse.Namespace) -> None:
    try:
        rounds = abstract(symmetry_tasks(), abstraction_primitives(), options.rounds, options.candidates)
    except ImportError as error:
        raise SystemExit(str(error)) from error
    for number, found in enumerate(rounds):
        learned = ", ".join(primitive.name for primitive in found.learned) or "nothing"
        CONSOLE.print(
            f"round {number}: {len(found.solutions)} of 36 solved, {len(found.right)} also on held-out pairs; "
            f"learned {learned}"
        )


def run_memory(options: argparse.Namespace) -> None:
    table = Table("tokens", "flax.linen.RNN, MiB", f"budget {options.budget}, MiB", "states of chunks, MiB")
    for length in options.lengths:
        row = memory.measure(length, batch=16, features=128, chunk=64, budget=options.budget)
        table.add_row(f"{row.tokens:,}", *(f"{size / 2**20:.1f}" for size in row[1:4]))
    CONSOLE.print(table)


if __name__ == "__main__":
    main()
