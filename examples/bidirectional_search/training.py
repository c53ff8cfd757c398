"""Training: supervised on teachers' episodes, and REINFORCE on the policy's own; one update for both.

An update replays a padded batch of whole episodes through the memory-bounded reader. Its loss is minus the sum over
decisions of weight × log-probability, per episode, minus the entropy bonus, the mean entropy of the decisions that the
policy drew itself. Weights are 1 for what a teacher did. For REINFORCE (Williams 1992) they are advantages: an
episode's reward minus the mean of the other rollouts of the same task, which no weight of its own depends on
(leave-one-out, Kool et al. 2019).
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from examples.bidirectional_search.policy import Episodes, Policy, remember
from examples.bidirectional_search.rollout import Game, Roller
from examples.bidirectional_search.stream import Layout, Stream, pad


class State(NamedTuple):
    """All that is trained."""

    variables: Any
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class Settings:
    batch: int = 32
    features: int = 64
    learning_rate: float = 3e-3
    clip: float = 1.0
    entropy: float = 0.0
    budget: int | str | None = "12MiB"  # bytes: a percentage that does for long episodes is too little for short ones
    horizon: int = 0  # tokens that the update gates are set for at first; 0 leaves their biases at 0
    truncate: bool = False
    seed: int = 0


class Trainer:
    """A policy, its optimiser and the compiled update, for one layout."""

    def __init__(
        self, vocabulary: int, layout: Layout, settings: Settings, schedule: optax.Schedule | None = None
    ) -> None:
        """With a schedule of learning rates instead of the one of the settings, if it is given."""
        self.layout, self.settings = layout, settings
        self.policy = Policy(
            vocabulary, layout.operations, layout.argument_slots, settings.features, settings.budget, settings.truncate
        )
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(settings.clip), optax.adam(schedule or settings.learning_rate)
        )
        self.roller = Roller(self.policy, layout, settings.batch)
        self._update = jax.jit(self._updated)

    def first_state(self) -> State:
        init_key, bias_key = jax.random.split(jax.random.key(self.settings.seed))
        # Shapes of variables do not depend on the length, and without a gradient no budget is needed.
        variables = jax.jit(self.policy.clone(budget=None).init)(init_key, pad([Stream(self.layout)], self.layout))
        if self.settings.horizon:
            variables = remember(variables, self.settings.horizon, bias_key)
        return State(variables, self.optimizer.init(variables))

    def update(self, state: State, episodes: Episodes) -> tuple[State, dict[str, jax.Array]]:
        """One step on a batch; metrics are means over decisions, of -log p, the entropy, and whether
        what was taken is the likeliest."""
        return self._update(state, episodes)

    def check_budget(self, batch: int) -> None:
        """Raises at once, and not after hours of other training, if the budget is too small for such a batch."""
        empty = pad([Stream(self.layout)] * batch, self.layout)
        jax.eval_shape(self._updated, jax.eval_shape(self.first_state), empty)

    def compile(self, state: State, episodes: Episodes) -> Any:
        """The program of `update`, of these shapes; neither need be arrays."""
        return self._update.lower(state, episodes).compile()

    def loss(self, variables: Any, episodes: Episodes) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_p, entropy, likeliest = self.policy.apply(variables, episodes)
        weighted = -jnp.sum(episodes.weights * log_p) / len(episodes.weights)
        bonus = _mean(entropy, episodes.valid & episodes.own[:, None])
        metrics = {
            "nats": -_mean(log_p, episodes.valid),
            "entropy": _mean(entropy, episodes.valid),
            "likeliest": _mean(likeliest, episodes.valid),
        }
        return weighted - self.settings.entropy * bonus, metrics

    def _updated(self, state: State, episodes: Episodes) -> tuple[State, dict[str, jax.Array]]:
        gradient, metrics = jax.grad(self.loss, has_aux=True)(state.variables, episodes)
        change, optimizer = self.optimizer.update(gradient, state.optimizer)
        return State(optax.apply_updates(state.variables, change), optimizer), metrics


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    """0 where there are none."""
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(where.sum(), 1)


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Rewards (tasks, rollouts) minus the mean of the other rollouts of the task."""
    rollouts = rewards.shape[1]
    if rollouts < 2:
        raise ValueError("a leave-one-out baseline needs at least two rollouts of each task, got 1")
    return rewards - (rewards.sum(1, keepdims=True) - rewards) / (rollouts - 1)


def reinforce(
    trainer: Trainer,
    state: State,
    games_of_tasks: Sequence[Sequence[Game]],
    key: jax.Array,
    relabel: Callable[[Game], Stream | None] | None = None,
) -> tuple[State, dict[str, Any]]:
    """One REINFORCE update on games that are played here, the same number for each task.

    With `relabel`, a game that was lost also teaches as if what it reached had been asked for (hindsight): the stream
    of the game that `relabel` makes of it joins the batch with weight 1, in a half padded with empty episodes.
    """
    games = [game for of_task in games_of_tasks for game in of_task]
    trainer.roller(state.variables, games, key)
    rewards = np.array([[float(game.solved) for game in of_task] for of_task in games_of_tasks])
    weights, streams = [*leave_one_out(rewards).ravel()], [game.stream for game in games]
    if relabel is not None:
        again = [stream for game in games if not game.solved and (stream := relabel(game)) is not None]
        empty = len(games) - len(again)
        streams += again + [Stream(trainer.layout)] * empty
        weights += [1.0] * len(again) + [0.0] * empty
    own = np.arange(len(streams)) < len(games)
    state, metrics = trainer.update(state, pad(streams, trainer.layout, weights, own))
    return state, {**metrics, "solved": rewards.mean()}


class Log:
    """Metrics as lines of JSON, and a progress bar that shows the last ones."""

    def __init__(self, path: Path | None, console: Console) -> None:
        self.path, self.console, self.start = path, console, time.perf_counter()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **metrics: Any) -> None:
        if self.path is None:
            return
        plain = {name: float(value) if hasattr(value, "dtype") else value for name, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({**plain, "seconds": round(time.perf_counter() - self.start, 2)}) + "\n")

    def bar(self) -> Progress:
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
        return Progress(*columns, console=self.console)

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]


def run(
    state: State,
    step: Callable[[State, int], tuple[State, dict[str, Any]]],
    updates: int,
    log: Log,
    title: str,
    measure: Callable[[State], dict[str, Any]] | None = None,
    every: int = 0,
) -> State:
    """`updates` times `step`, with a bar; metrics of every tenth go to the log.

    After every `every` updates but the last, unless this is 0, what `measure` says of the state goes there too.
    """
    with log.bar() as progress:
        task = progress.add_task(title, total=updates, shown="")
        for number in range(updates):
            state, metrics = step(state, number)
            measured = bool(measure and every and (number + 1) % every == 0 and number + 1 < updates)
            if measured:
                metrics = {**metrics, **measure(state)}
            if measured or number % 10 == 0 or number == updates - 1:
                log.write(stage=title, update=number, **metrics)
                shown = ", ".join(f"{name} {float(value):.3f}" for name, value in metrics.items())
                progress.update(task, shown=shown)
            progress.advance(task)
    return state


def save(directory: Path, state: State, step: int) -> None:
    with ocp.CheckpointManager(directory.resolve()) as checkpoints:
        checkpoints.save(step, args=ocp.args.StandardSave(state), force=True)


def restore(directory: Path, state: State) -> State:
    """The last state saved, of the structure of `state`."""
    with ocp.CheckpointManager(directory.resolve()) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise ValueError(f"{directory} has no checkpoint; make one with: train ... --directory {directory}")
        return checkpoints.restore(step, args=ocp.args.StandardRestore(state))
