"""One arm on one domain: supervised training, then REINFORCE, with held-out tasks played on the way."""

import dataclasses
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from examples.bidirectional_search.abstraction import abstract
from examples.bidirectional_search.domain import Domain, Task
from examples.bidirectional_search.domains import arc
from examples.bidirectional_search.domains.double_and_add import DoubleAndAdd
from examples.bidirectional_search.domains.game24 import Game24
from examples.bidirectional_search.domains.grids import abstraction_primitives
from examples.bidirectional_search.evaluation import Baselines, Score, policy_attempts, score
from examples.bidirectional_search.games import ENCODINGS, Arena, SearchGame
from examples.bidirectional_search.policy import Episodes
from examples.bidirectional_search.stream import Stream, pad
from examples.bidirectional_search.teacher import hindsight
from examples.bidirectional_search.training import Log, Settings, State, Trainer, reinforce, restore, run, save

CHUNKS = {"double-and-add": 24, "game24": 4, "arc": 64}  # tokens: 24 are an action and its number, 4 those of an action
# Of a held-out task, where they are sampled; of one of ARC's random programs, and of one task for REINFORCE.
ROLLOUTS = {"double-and-add": 1, "game24": 10, "arc": 200}
PROGRAM_ROLLOUTS, ROLLOUTS_PER_TASK = 5, 8
SORTED_BATCHES = 8  # of lessons, sorted by length together
RECORD = "experiment.json"

Scores = dict[str, Score]  # by split


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One arm on one domain.

    Attributes:
      domain: a name in `CHUNKS`.
      bidirectional: the arm; the other is forward-only.
      settings: of the training.
      encoding: of the stream, see `games.py`.
      updates: supervised ones, each on `settings.batch` episodes that the teacher makes for it.
      reinforce_updates, reinforce_batch, reinforce_rate: after these, on so many of the policy's own episodes, with
        this learning rate.
      hindsight: lost games of REINFORCE teach as if what they reached had been asked for.
      limit: actions, for ARC.
      learned: for ARC, whether the abstractions of round 0 are operations too.
      every: updates between rollouts on held-out tasks; 0 for the end only.
      greedy: whether these take the likeliest action.
    """

    domain: str
    bidirectional: bool
    settings: Settings
    encoding: str = "append"
    updates: int = 282
    reinforce_updates: int = 0
    reinforce_batch: int = 128
    reinforce_rate: float = 5e-4
    hindsight: bool = False
    limit: int = arc.LIMIT
    learned: bool = False
    every: int = 0
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"the encoding must be one of {', '.join(ENCODINGS)}, got {self.encoding!r}")
        if self.encoding != "append" and self.domain != "double-and-add":
            raise ValueError(f"the encoding {self.encoding!r} is for double-and-add; {self.domain} has 'append'")
        if self.domain != "arc" and (self.learned or self.limit != arc.LIMIT):
            raise ValueError(f"a limit of actions and learned operations are for arc, not for {self.domain}")
        if self.reinforce_updates and (self.reinforce_batch < 1 or self.reinforce_batch % ROLLOUTS_PER_TASK):
            raise ValueError(
                f"REINFORCE plays {ROLLOUTS_PER_TASK} rollouts of each task: its batch must be a multiple of that, "
                f"got {self.reinforce_batch}"
            )
        if self.hindsight and (self.domain == "double-and-add" or not self.reinforce_updates):
            raise ValueError("hindsight is for REINFORCE, and for domains that keep their nodes: game24 and arc")
        if not self.updates + self.reinforce_updates:
            raise ValueError("there are no updates to make")

    @cached_property
    def arena(self) -> Arena:
        return Arena(self._domain(), CHUNKS[self.domain], self.bidirectional, self.encoding)

    @property
    def splits(self) -> dict[str, tuple[list[Task], int]]:
        """Held-out tasks by name, and how many rollouts each gets."""
        domain = self.arena.domain
        return {
            split or "all": (domain.held_out(split), 1 if self.greedy else self._rollouts(split))
            for split in domain.splits
        }

    def _rollouts(self, split: str) -> int:
        return PROGRAM_ROLLOUTS if split == "programs" else ROLLOUTS[self.domain]

    def trainer(self) -> Trainer:
        rate = optax.join_schedules(
            [optax.constant_schedule(self.settings.learning_rate), optax.constant_schedule(self.reinforce_rate)],
            [self.updates],
        )
        return Trainer(self.arena.vocabulary, self.arena.layout, self.settings, rate)

    def _domain(self) -> Domain:
        # One split of tasks for all seeds, which are for weights and lessons.
        if self.domain != "arc":
            return {"double-and-add": DoubleAndAdd, "game24": Game24}[self.domain]()
        learned = abstract(arc.symmetry_tasks(), abstraction_primitives(), rounds=0)[0].learned if self.learned else ()
        return arc.load(limit=self.limit, learned=learned)


class Lessons:
    """Batches of the teacher's episodes, made anew. Those of a batch are about as long as each other, to pad little."""

    def __init__(self, arena: Arena, batch: int, rng: np.random.Generator) -> None:
        self.arena, self.batch, self.rng = arena, batch, rng
        self.ready: list[list[Stream]] = []

    def next(self) -> Episodes:
        if not self.ready:
            streams = [self.arena.lesson(self.rng) for _ in range(SORTED_BATCHES * self.batch)]
            streams.sort(key=lambda stream: len(stream.chunks))
            first = self.rng.permutation(SORTED_BATCHES) * self.batch
            self.ready = [streams[start : start + self.batch] for start in first]
        return pad(self.ready.pop(), self.arena.layout)


def train(experiment: Experiment, log: Log, directory: Path | None = None) -> tuple[State, dict[str, Scores]]:
    """Trains one arm; with a directory, its state after each stage is kept there for `restored`.

    Returns:
      state: the last one.
      scores: of held-out tasks, by the stage that they were played after, "supervised" and "REINFORCE".
    """
    arena, trainer, seed = experiment.arena, experiment.trainer(), experiment.settings.seed
    rng, key = np.random.default_rng(seed), jax.random.key(seed + 1)
    lessons = Lessons(arena, experiment.settings.batch, rng)
    relabel = _relabeller(arena, rng) if experiment.hindsight else None
    if experiment.reinforce_updates:
        trainer.check_budget(experiment.reinforce_batch * (1 + experiment.hindsight))

    def lesson(state: State, number: int) -> tuple[State, dict[str, Any]]:
        return trainer.update(state, lessons.next())

    def rollouts(state: State, number: int) -> tuple[State, dict[str, Any]]:
        tasks = [arena.domain.random_task(rng) for _ in range(experiment.reinforce_batch // ROLLOUTS_PER_TASK)]
        games = [[arena.game(task) for _ in range(ROLLOUTS_PER_TASK)] for task in tasks]
        return reinforce(trainer, state, games, jax.random.fold_in(key, number), relabel)

    def played(state: State) -> dict[str, float]:
        return {f"held out {name}": found.success for name, found in scores(experiment, trainer, state).items()}

    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RECORD).write_text(json.dumps(dataclasses.asdict(experiment), indent=2) + "\n")
    state, found, done = trainer.first_state(), dict[str, Scores](), 0
    stages = (
        ("supervised", lesson, experiment.updates),
        ("REINFORCE", rollouts, experiment.reinforce_updates),
    )
    for stage, step, updates in stages:
        if updates:
            state = run(state, step, updates, log, stage, played, experiment.every)
            done += updates
            if directory is not None:  # before anything that follows can fail
                save(directory, state, done)
            found[stage] = scores(experiment, trainer, state)
    return state, found


def scores(experiment: Experiment, trainer: Trainer, state: State) -> Scores:
    """Of the policy on each split."""
    return {
        name: score(
            policy_attempts(
                trainer, experiment.arena, state, tasks, rollouts, experiment.settings.seed, experiment.greedy
            )
        )
        for name, (tasks, rollouts) in experiment.splits.items()
    }


def baselines(experiment: Experiment) -> dict[str, dict[str, Score]]:
    """On each split, of each policy that reads nothing."""
    found = Baselines(experiment.arena.domain, experiment.bidirectional, experiment.settings.seed)
    return {name: found.scores(tasks, rollouts) for name, (tasks, rollouts) in experiment.splits.items()}


def restored(directory: Path) -> tuple[Experiment, Trainer, State]:
    """What `train` has left in a directory."""
    path = directory / RECORD
    if not path.is_file():
        raise ValueError(f"{directory} holds no trained policy; make one with: train ... --directory {directory}")
    record = json.loads(path.read_text())
    try:
        experiment = Experiment(**{**record, "settings": Settings(**record["settings"])})
    except TypeError as error:
        raise ValueError(f"{path} is of another version of this program: {error}") from error
    trainer = experiment.trainer()
    return experiment, trainer, restore(directory, trainer.first_state())


def _relabeller(arena: Arena, rng: np.random.Generator) -> Any:
    def relabel(game: SearchGame) -> Stream | None:
        found = hindsight(game.search, rng, 1.0 if arena.bidirectional else 0.0)
        return None if found is None else arena.replay(*found)

    return relabel


def solve(directory: Path, name: str | None, rollouts: int, seed: int) -> tuple[int, SearchGame]:
    """Rolls a policy out on one held-out task until it is solved; returns how often, and the last game."""
    experiment, trainer, state = restored(directory)
    tasks: dict[str, Task] = {}
    for task in (task for some, _ in experiment.splits.values() for task in some):
        tasks.setdefault(task.name, task)  # random programs can have the same name
    task = next(iter(tasks.values())) if name is None else tasks.get(name)
    if task is None:
        some = ", ".join(repr(known) for known in list(tasks)[-20:])
        raise ValueError(f"{experiment.domain} has no held-out task {name!r}; some that it has: {some}")
    games: list[SearchGame] = []
    while len(games) < rollouts:
        now = [experiment.arena.game(task) for _ in range(min(trainer.settings.batch, rollouts - len(games)))]
        trainer.roller(state.variables, now, jax.random.key(seed + len(games)))
        for game in now:
            games.append(game)
            if game.search.generalises():
                return len(games), game
    return len(games), games[-1]
