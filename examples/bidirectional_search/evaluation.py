"""How often held-out tasks are solved, by a policy and by what reads nothing: per rollout, and rollouts to solve."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from examples.bidirectional_search.baselines import ConstantPolicy, attempts, best_logits, mean_log
from examples.bidirectional_search.domain import Domain, Task
from examples.bidirectional_search.games import Arena
from examples.bidirectional_search.training import State, Trainer

TUNING_TASKS, TUNING_ACTIONS = 100, 1500  # at most so many tasks, of so many actions in all, in each of their rollouts
ROLLOUTS_TO_COUNT = 20  # from so many on, rollouts to solve are a score too


class Score(NamedTuple):
    """Of one policy on one split.

    Attributes:
      success: per rollout, the mean over tasks.
      rollouts: geometric mean over tasks of the number up to the first that solves, in expectation over the order in
        which they were made; of a task that none solves it is one more than were made.
      solved: the number of tasks that any rollout solves.
    """

    success: float
    rollouts: float
    solved: int


def score(solved: np.ndarray) -> Score:
    """From bool (tasks, rollouts).

    >>> score(np.array([[False, True, False], [False, False, False]]))
    Score(success=0.16666666666666666, rollouts=2.8284271247461903, solved=1)
    """
    # Of N places, the first of s that are drawn at random is at (N + 1) / (s + 1) on average.
    first = (solved.shape[1] + 1) / (solved.sum(1) + 1)
    return Score(float(solved.mean()), float(np.exp(np.log(first).mean())), int(solved.any(1).sum()))


def policy_attempts(
    trainer: Trainer, arena: Arena, state: State, tasks: Sequence[Task], rollouts: int, seed: int, greedy: bool = False
) -> np.ndarray:
    """bool (tasks, rollouts): whether a rollout solves the task, held-out examples included."""
    games = [arena.game(task) for task in tasks for _ in range(rollouts)]
    trainer.roller(state.variables, games, jax.random.key(seed), greedy=greedy)
    return np.array([game.search.generalises() for game in games]).reshape(len(tasks), rollouts)


class Baselines:
    """Policies that read nothing: random, and constant logits, tuned on training tasks or on the very tasks played."""

    def __init__(self, domain: Domain, bidirectional: bool, seed: int) -> None:
        self.domain, self.bidirectional, self.seed = domain, bidirectional, seed
        rng = np.random.default_rng(seed)
        self.few = min(TUNING_TASKS, max(12, TUNING_ACTIONS // domain.max_actions))
        self.logits = self._tuned([domain.random_task(rng) for _ in range(self.few)], np.mean)

    def scores(self, tasks: Sequence[Task], rollouts: int) -> dict[str, Score]:
        """By the name of the policy."""
        here = self._tuned(tasks[: self.few], mean_log if rollouts >= ROLLOUTS_TO_COUNT else np.mean)
        every = {"random": None, "constant": self.logits, "constant, tuned here": here}
        policies = {name: ConstantPolicy(self.domain, self.bidirectional, logits) for name, logits in every.items()}
        return {name: score(attempts(policy, tasks, rollouts, self.seed)) for name, policy in policies.items()}

    def _tuned(self, tasks: Sequence[Task], measure: Callable[[np.ndarray], float]) -> np.ndarray:
        rollouts = 3 * max(1, self.few // len(tasks))
        return best_logits(self.domain, tasks, self.bidirectional, self.seed, rollouts=rollouts, score=measure)
