"""Policies that read nothing: random, and constant preferences for operations. Both belong beside every result.

The random policy is uniform over the structurally possible operations and then, for each argument, over the nodes that
it may be. A constant-logit policy prefers some operations, always alike; its arguments are uniform too. The best one is
sought by the cross-entropy method: draw candidates, keep the best quarter, draw around these.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np

from examples.bidirectional_search.domain import Action, Domain, Task
from examples.bidirectional_search.graph import Search


class ConstantPolicy:
    """Draws operations in proportion to exp(logits), among those that are possible; without logits, uniformly."""

    def __init__(self, domain: Domain, bidirectional: bool, logits: Sequence[float] | None = None) -> None:
        self.domain, self.bidirectional = domain, bidirectional
        weights = (
            [1.0] * len(domain.operations) if logits is None else np.exp(np.subtract(logits, max(logits))).tolist()
        )
        self.weights = [
            weight if bidirectional or operation.missing is None else 0.0
            for weight, operation in zip(weights, domain.operations, strict=True)
        ]

    def action(self, search: Search, rng: random.Random) -> Action:
        # Structurally every operation is possible until the search is over: there are inputs, and there is the target.
        (operation,) = rng.choices(range(len(self.weights)), self.weights)
        nodes: dict[bool, list[int]] = {True: [], False: []}
        for slot, grounded in enumerate(search.grounded.tolist()):
            nodes[grounded].append(slot)
        return Action(operation, tuple(rng.choice(nodes[must]) for must in self.domain.operations[operation].grounded))

    def play(self, task: Task, rng: random.Random) -> Search:
        """One rollout, to its end."""
        search = Search(self.domain, task, self.bidirectional)
        while not search.over:
            search.step(self.action(search, rng))
        return search


def attempts(policy: ConstantPolicy, tasks: Sequence[Task], rollouts: int, seed: int) -> np.ndarray:
    """bool (tasks, rollouts): whether a rollout solves the task, held-out examples included."""
    rng = random.Random(seed)
    return np.array([[policy.play(task, rng).generalises() for _ in range(rollouts)] for task in tasks])


def mean_log(rates: np.ndarray) -> float:
    """A score for which tasks count alike however hard they are, as for the geometric mean of rollouts to solve."""
    return float(np.log(rates + 0.01).mean())


def best_logits(
    domain: Domain,
    tasks: Sequence[Task],
    bidirectional: bool,
    seed: int,
    *,
    rollouts: int = 1,
    score: Callable[[np.ndarray], float] = np.mean,
    generations: int = 10,
    candidates: int = 16,
) -> np.ndarray:
    """Preferences for operations for which the cross-entropy method finds the highest score of `tasks`' success rates.

    The rates come of `rollouts` per task, anew in every generation.
    """
    rng, size = np.random.default_rng(seed), len(domain.operations)
    mean, deviation = np.zeros(size), np.full(size, 2.0)
    for generation in range(generations):
        drawn = mean + deviation * rng.standard_normal((candidates, size))
        drawn[0] = mean
        policies = [ConstantPolicy(domain, bidirectional, logits) for logits in drawn]
        scores = [score(attempts(policy, tasks, rollouts, seed + generation).mean(1)) for policy in policies]
        best = drawn[np.argsort(scores)[-candidates // 4 :]]
        mean, deviation = best.mean(0), best.std(0) + 0.2
    return mean
