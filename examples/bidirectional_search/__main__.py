"""Neural-guided, bidirectional program search: train a recurrent policy through whole episodes inside a memory budget.

\b
python -m examples.bidirectional_search train --domain double-and-add --arm bidirectional --seed 0
python -m examples.bidirectional_search train --domain double-and-add --arm forward --encoding msb --every 141
python -m examples.bidirectional_search train --domain game24 --updates 1250 --reinforce 200 --directory runs/game24
python -m examples.bidirectional_search solve runs/game24 --task "1 2 6 9 -> 24" --picture solved.svg
python -m examples.bidirectional_search evaluate runs/game24
python -m examples.bidirectional_search plot runs/* --picture curves.png
python -m examples.bidirectional_search long --bits 128 --truncate
python -m examples.bidirectional_search abstract --rounds 1
python -m examples.bidirectional_search memory --lengths 2560 --lengths 40000
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from examples.bidirectional_search import curves, drawing, experiments, long_version, memory
from examples.bidirectional_search.abstraction import abstract
from examples.bidirectional_search.domains.arc import LIMIT, symmetry_tasks
from examples.bidirectional_search.domains.grids import abstraction_primitives
from examples.bidirectional_search.evaluation import ROLLOUTS_TO_COUNT, Score
from examples.bidirectional_search.experiments import CHUNKS, Experiment
from examples.bidirectional_search.games import ENCODINGS
from examples.bidirectional_search.training import Log, Settings

CONSOLE = Console()
POSITIVE, COUNT = click.IntRange(min=1), click.IntRange(min=0)
# Of the training, by domain: what the example's README was measured with.
DEFAULTS = {
    "double-and-add": {"features": 64, "learning_rate": 3e-3, "budget": "12MiB", "updates": 282, "horizon": 0},
    "game24": {"features": 128, "learning_rate": 2e-3, "budget": "12MiB", "updates": 1250, "horizon": 0},
    "arc": {"features": 128, "learning_rate": 2e-3, "budget": "24MiB", "updates": 2000, "horizon": 256},
}


@click.group(help=__doc__, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def main() -> None:
    pass


def spoken(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that explain themselves are printed without a traceback."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        try:
            command(**options)
        except (OSError, ValueError, ImportError) as error:
            raise click.ClickException(str(error)) from error

    return run


def budget_of(text: str) -> int | str:
    """As bptt_jax takes it: bytes, 64MiB, 5%; or "plain"."""
    return int(text) if text.isdigit() else text


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `train` and `long` share."""
    for option in (
        click.option("--features", type=POSITIVE, help="Of the reader and the heads."),
        click.option("--batch", type=POSITIVE, default=32, show_default=True),
        click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True)),
        click.option("--budget", type=budget_of, help="Of the reader's backward pass; 'plain' is flax.linen.RNN."),
        click.option("--seed", type=COUNT, default=0, show_default=True),
        click.option(
            "--directory",
            type=click.Path(file_okay=False, path_type=Path),
            help="A new one, for metrics; `train` also keeps the trained policy there.",
        ),
    ):
        command = option(command)
    return command


@main.command()
@click.option("--domain", type=click.Choice(list(CHUNKS)), default="double-and-add", show_default=True)
@click.option("--arm", type=click.Choice(["forward", "bidirectional"]), default="bidirectional", show_default=True)
@click.option("--encoding", type=click.Choice(ENCODINGS), default="append", show_default=True)
@click.option("--updates", type=COUNT, help="Supervised ones; 282 are two epochs of double-and-add.")
@click.option("--reinforce", type=COUNT, default=0, show_default=True, help="Updates by REINFORCE after these.")
@click.option("--reinforce-batch", type=POSITIVE, default=128, show_default=True, help="Rollouts of such an update.")
@click.option(
    "--reinforce-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=5e-4,
    show_default=True,
    help="Learning rate of these.",
)
@click.option("--hindsight", is_flag=True, help="Lost games of REINFORCE teach what they reached.")
@click.option("--entropy", type=click.FloatRange(min=0), default=0.01, show_default=True, help="Weight, in REINFORCE.")
@click.option("--horizon", type=COUNT, help="Tokens that the reader's gates are set for at first.")
@click.option("--limit", type=POSITIVE, default=LIMIT, show_default=True, help="Actions, for arc.")
@click.option("--learned", is_flag=True, help="For arc: abstractions of round 0 are operations too.")
@click.option("--every", type=COUNT, default=0, help="Updates between rollouts on held-out tasks; 0: at the end only.")
@click.option("--greedy/--sampled", default=None, help="Held-out rollouts; greedy for double-and-add if not given.")
@training_options
@spoken
def train(directory: Path | None, **options: Any) -> None:
    """One arm on one domain, and what it solves beside policies that read nothing."""
    experiment = _experiment(**options)
    log = _log_in(directory)
    _, trained = experiments.train(experiment, log, directory)
    _show(experiment, trained, log)


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@spoken
def evaluate(directory: Path) -> None:
    """Plays the held-out tasks again with the policy that `train` has left in a directory."""
    experiment, trainer, state = experiments.restored(directory)
    _show(experiment, {"policy": experiments.scores(experiment, trainer, state)}, Log(None, CONSOLE))


def _show(experiment: Experiment, trained: dict[str, experiments.Scores], log: Log) -> None:
    """A table, and a line of the log, for each split: the policy by stages beside what reads nothing."""
    others = experiments.baselines(experiment)
    title = f"{experiment.domain}, {'bidirectional' if experiment.bidirectional else 'forward only'}"
    table = Table("held-out tasks", *trained, *next(iter(others.values())), title=title)
    for name, (tasks, rollouts) in experiment.splits.items():
        row = {stage: found[name] for stage, found in trained.items()} | others[name]
        log.write(stage="held out", split=name, **{key: score._asdict() for key, score in row.items()})
        table.add_row(f"{name} ({len(tasks)} × {rollouts})", *(_shown(score, rollouts) for score in row.values()))
    CONSOLE.print(table)


def _log_in(directory: Path | None) -> Log:
    """Metrics of one run; they are not mixed with another's."""
    if directory is not None and directory.is_dir() and any(directory.iterdir()):
        raise ValueError(f"{directory} holds something already, such as another run; name a new directory")
    return Log(None if directory is None else directory / curves.METRICS, CONSOLE)


def _experiment(domain: str, arm: str, greedy: bool | None, **options: Any) -> Experiment:
    given = {name: options.pop(name) for name in DEFAULTS[domain]}
    chosen = {name: DEFAULTS[domain][name] if value is None else value for name, value in given.items()}
    settings = {name: options.pop(name) for name in ("batch", "entropy", "seed")}
    updates = chosen.pop("updates")
    return Experiment(
        domain,
        arm == "bidirectional",
        Settings(**settings, **chosen),
        updates=updates,
        reinforce_updates=options.pop("reinforce"),
        greedy=domain == "double-and-add" if greedy is None else greedy,
        **options,
    )


def _shown(score: Score, rollouts: int) -> str:
    return f"{score.success:.1%}" + (
        f", {score.rollouts:.2f} rollouts, {score.solved} solved" if rollouts >= ROLLOUTS_TO_COUNT else ""
    )


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--task", help="Its name; without, the first held-out task.")
@click.option("--rollouts", type=POSITIVE, default=200, show_default=True, help="At most.")
@click.option("--seed", type=COUNT, default=0, show_default=True)
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Where to draw the graph: .svg, .png.")
@spoken
def solve(directory: Path, task: str | None, rollouts: int, seed: int, picture: Path | None) -> None:
    """Rolls a trained policy out on one task until it is solved; prints the program, draws the graph.

    Actions are drawn, not the likeliest ones taken. The picture is that of the last rollout, solved or not.
    """
    tried, game = experiments.solve(directory, task, rollouts, seed)
    search = game.search
    if picture is not None:
        drawing.draw(search, picture)
    if not search.generalises():
        raise click.ClickException(f"{search.task.name} is not solved in {rollouts} rollouts")
    CONSOLE.print(f"{search.task.name}: solved in rollout {tried}, {search.steps} steps", highlight=False)
    CONSOLE.print(str(search.program()), highlight=False)


@main.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--picture", required=True, type=click.Path(dir_okay=False, path_type=Path))
@spoken
def plot(directories: Sequence[Path], picture: Path) -> None:
    """Curves of runs of `train` that were given these directories."""
    curves.plot(directories, picture)


@main.command()
@click.option("--bits", type=POSITIVE, multiple=True, default=[128], help="K; several are a curriculum.")
@click.option("--updates", type=POSITIVE, default=350, show_default=True, help="For each number of bits.")
@click.option("--window", type=POSITIVE, default=32, show_default=True, help="Tokens of a chunk.")
@click.option("--truncate", is_flag=True, help="No backpropagation from one window into the one before.")
@training_options
@spoken
def long(
    bits: Sequence[int],
    updates: int,
    window: int,
    directory: Path | None,
    features: int | None,
    learning_rate: float | None,
    budget: str | None,
    **settings: Any,
) -> None:
    """Double-and-add with targets of K bits: full against truncated backpropagation."""
    given = {"features": features, "learning_rate": learning_rate, "budget": budget}
    chosen = Settings(**{name: value or DEFAULTS["double-and-add"][name] for name, value in given.items()}, **settings)
    _, accuracy = long_version.train([(count, updates) for count in bits], window, chosen, _log_in(directory))
    kind = f"through {window} tokens" if settings["truncate"] else "through all tokens"
    CONSOLE.print(f"K={bits[-1]}, backpropagation {kind}: {accuracy:.1%} of held-out decisions", highlight=False)


@main.command(name="abstract")
@click.option("--rounds", type=POSITIVE, default=1, show_default=True)
@click.option("--candidates", type=POSITIVE, default=20_000, show_default=True, help="Of each task.")
@spoken
def learn_abstractions(rounds: int, candidates: int) -> None:
    """Abstractions from the ARC tasks that enumeration solves, round by round."""
    for number, found in enumerate(abstract(symmetry_tasks(), abstraction_primitives(), rounds, candidates)):
        learned = ", ".join(primitive.name for primitive in found.learned) or "nothing"
        CONSOLE.print(
            f"round {number}: {len(found.solutions)} of 36 solved, {len(found.right)} also on held-out pairs; "
            f"learned {learned}",
            highlight=False,
        )


@main.command(name="memory")
@click.option("--lengths", type=POSITIVE, multiple=True, default=[2_560, 10_000, 40_000], help="Tokens.")
@click.option("--budget", type=budget_of, default="16MiB", show_default=True)
@click.option("--run", type=POSITIVE, help="Tokens of an episode; two updates are run.")
@spoken
def measure_memory(lengths: Sequence[int], budget: int | str, run: int | None) -> None:
    """Temporaries of the training step by the length of the episode, compiled and not run."""
    settings = Settings(batch=16, features=128, budget=budget)
    table = Table("tokens", "flax.linen.RNN, MiB", f"budget {budget}, MiB", "states of chunks, MiB")
    for length in lengths:
        row = memory.measure(length, 64, settings)
        table.add_row(f"{row.tokens:,}", *(f"{size / 2**20:.1f}" for size in row[1:4]))
    CONSOLE.print(table)
    if run is not None:
        seconds = memory.run_updates(run, 64, settings, updates=2)
        CONSOLE.print(f"two updates of {run:,} tokens within {budget}: {seconds[0]:.1f} s, {seconds[1]:.1f} s")


if __name__ == "__main__":
    main()
