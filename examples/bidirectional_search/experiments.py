"""Training one arm on one domain, and how many held-out tasks it then solves, beside what reads nothing."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from examples.bidirectional_search.baselines import ConstantPolicy, best_logits, success_rate
from examples.bidirectional_search.domain import Domain, Task
from examples.bidirectional_search.domains.double_and_add import DoubleAndAdd
from examples.bidirectional_search.domains.game24 import Game24
from examples.bidirectional_search.games import Arena
from examples.bidirectional_search.stream import pad
from examples.bidirectional_search.training import Log, Settings, State, Trainer, reinforce, run

DOMAINS = {"double-and-add": DoubleAndAdd, "game24": Game24}
CHUNKS = {"double-and-add": 24, "game24": 4}  # tokens: an action and its number, and an action with one token a number
SPLITS = {"double-and-add": ("",), "game24": ("1", "2", "3")}
ROLLOUTS = 8  # of one task, for REINFORCE
BASELINE_ROLLOUTS = 20


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One arm on one domain.

    Attributes:
      domain: a name in `DOMAINS`.
      bidirectional: the arm; the other is forward-only.
      encoding: of the stream, see `games.py`.
      updates: supervised ones, each on `settings.batch` episodes that the teacher makes for it.
      reinforce_updates: after these, on the policy's own episodes.
    """

    domain: str
    bidirectional: bool
    encoding: str
    updates: int
    settings: Settings
    reinforce_updates: int = 0

    def arena(self) -> Arena:
        # One split of tasks for all seeds, which are for weights and lessons.
        return Arena(DOMAINS[self.domain](), CHUNKS[self.domain], self.bidirectional, self.encoding)


def train(experiment: Experiment, log: Log) -> tuple[Trainer, Arena, State]:
    """Trains one arm."""
    arena, settings = experiment.arena(), experiment.settings
    trainer, rng = Trainer(arena.vocabulary, arena.layout, settings), np.random.default_rng(settings.seed)
    key = jax.random.key(settings.seed + 1)

    def lesson(state: State, number: int) -> tuple[State, dict[str, Any]]:
        return trainer.update(state, pad([arena.lesson(rng) for _ in range(settings.batch)], arena.layout))

    def rollouts(state: State, number: int) -> tuple[State, dict[str, Any]]:
        tasks = [arena.domain.random_task(rng) for _ in range(settings.batch // ROLLOUTS)]
        games = [[arena.game(task) for _ in range(ROLLOUTS)] for task in tasks]
        return reinforce(trainer, state, games, jax.random.fold_in(key, number))

    state = run(trainer.first_state(), lesson, experiment.updates, log, "supervised")
    if experiment.reinforce_updates:
        state = run(state, rollouts, experiment.reinforce_updates, log, "REINFORCE")
    return trainer, arena, state


def solved(
    trainer: Trainer, arena: Arena, state: State, tasks: Sequence[Task], seed: int, greedy: bool = True
) -> float:
    """The part of the tasks that one rollout each solves."""
    games = [arena.game(task) for task in tasks]
    trainer.roller(state.variables, games, jax.random.key(seed), greedy=greedy)
    return float(np.mean([game.solved for game in games]))


def baselines(domain: Domain, bidirectional: bool, tasks: Sequence[Task], seed: int) -> dict[str, float]:
    """The success per rollout of the random policy and of the best constant-logit one, sought on training tasks."""
    rng = np.random.default_rng(seed)
    logits = best_logits(domain, [domain.random_task(rng) for _ in range(100)], bidirectional, seed)
    return {
        name: float(
            success_rate(ConstantPolicy(domain, bidirectional, preferences), tasks, BASELINE_ROLLOUTS, seed).mean()
        )
        for name, preferences in (("random", None), ("constant logits", logits))
    }
