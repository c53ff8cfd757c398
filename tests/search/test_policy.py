"""The policy of the bidirectional search: rollouts and replays agree, budgets change bytes alone, it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.bidirectional_search import long_version, memory
from examples.bidirectional_search.domains.double_and_add import DoubleAndAdd, teacher_actions
from examples.bidirectional_search.games import ENCODINGS, Arena
from examples.bidirectional_search.policy import Policy, remember
from examples.bidirectional_search.stream import Layout, Stream, pad
from examples.bidirectional_search.training import Settings, Trainer, leave_one_out, reinforce, restore, save
from tests.support.search_domains import small_arc


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users run."""


SMALL = Settings(batch=4, features=8, budget="256KiB", horizon=24)


@functools.cache
def small_trainer():
    """One layout for all tests here: each is compiled once."""
    arena = Arena(DoubleAndAdd(limit=12), 24, bidirectional=True)
    trainer = Trainer(arena.vocabulary, arena.layout, SMALL)
    return arena, trainer, trainer.first_state()


class Sums:
    """A game with pointers, small enough for a test: nodes are numbers, operations take one or two of them."""

    LAYOUT = Layout(chunk=2, task_chunks=2, action_chunks=2, nodes=5, decisions=3, operations=3, argument_slots=2)
    ARITIES, VOCABULARY = (1, 2, 2), 16

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.stream, self.count, self.over, self.solved = Stream(self.LAYOUT), 0, False, False

    def begin(self):
        return self._node([1 + self.random.integers(8)]) + self._node([1 + self.random.integers(8)])

    def masks(self):
        arguments = np.zeros((3, 2, 5), np.bool_)
        for operation, arity in enumerate(self.ARITIES):
            arguments[operation, :arity, : self.count] = True
        return np.array([True, True, self.count > 2]), arguments

    def play(self, operation, arguments):
        arguments = arguments[: self.ARITIES[operation]]
        self.stream.decide(operation, arguments, *self.masks())
        self.over = len(self.stream.decisions) == self.LAYOUT.decisions
        self.solved = self.over and operation == 1
        if operation == 2:  # a wasted step: an action without a new node
            return self.stream.append([9 + operation], None)
        return self._node([9 + operation, *(1 + node for node in arguments)])

    def _node(self, tokens):
        self.count += 1
        return self.stream.append(tokens, self.count - 1)


@functools.cache
def sums_trainer():
    trainer = Trainer(Sums.VOCABULARY, Sums.LAYOUT, dataclasses.replace(SMALL, entropy=0.01))
    return trainer, trainer.first_state()


@pytest.mark.parametrize("greedy", [False, True])
def test_replayed_log_probabilities_equal_those_of_the_rollout(greedy):
    trainer, state = sums_trainer()
    games = [Sums(seed) for seed in range(6)]  # a full batch, and one of two
    played = trainer.roller(state.variables, games, jax.random.key(0), greedy=greedy)
    assert {len(log_p) for log_p in played} == {3}
    choice = trainer.policy.clone(budget=None).apply(state.variables, pad([g.stream for g in games], Sums.LAYOUT))
    np.testing.assert_allclose(choice.log_probability, played, rtol=0, atol=2e-6)
    assert not greedy or np.all(choice.likeliest)
    assert len({game.stream.decisions[0].operation for game in games}) > 1 or greedy  # the draws differ


@pytest.mark.slow
def test_arc_learns_from_a_batch_and_its_rollouts_replay():
    """Grids of several chunks, most of them padding that the reader skips; a learned operation among the others."""
    arena = Arena(small_arc(), 32, bidirectional=True)
    trainer = Trainer(arena.vocabulary, arena.layout, SMALL)
    state, rng = trainer.first_state(), np.random.default_rng(0)
    games = [arena.game(arena.domain.random_task(rng)) for _ in range(4)]
    played = trainer.roller(state.variables, games, jax.random.key(0))
    episodes = pad([game.stream for game in games], arena.layout)
    replayed = trainer.policy.clone(budget=None).apply(state.variables, episodes).log_probability
    for row, log_p in enumerate(played):
        np.testing.assert_allclose(replayed[row, : len(log_p)], log_p, rtol=0, atol=5e-6)
    before = trainer.loss(state.variables, lessons := pad([arena.lesson(rng) for _ in range(4)], arena.layout))[0]
    for _ in range(3):
        state, _ = trainer.update(state, lessons)
    assert trainer.loss(state.variables, lessons)[0] < before


def test_arguments_that_an_operation_does_not_have_do_not_count():
    trainer, state = sums_trainer()
    games = [Sums(seed) for seed in range(4)]
    trainer.roller(state.variables, games, jax.random.key(1))
    episodes = pad([game.stream for game in games], Sums.LAYOUT)
    unused = ~episodes.argument_masks.any(-1)
    assert unused.any()
    other = episodes._replace(arguments=np.where(unused, np.int32(3), episodes.arguments))
    policy = trainer.policy.clone(budget=None)
    for a, b in zip(policy.apply(state.variables, episodes), policy.apply(state.variables, other), strict=True):
        np.testing.assert_array_equal(a[..., -1], b[..., -1])


def test_gradients_within_a_budget_are_those_of_plain_scan():
    trainer, state = sums_trainer()
    games = [Sums(seed) for seed in range(4)]
    trainer.roller(state.variables, games, jax.random.key(2))
    episodes = pad([game.stream for game in games], Sums.LAYOUT, [0.5, -0.5, 1.0, 0.0])
    plain = Trainer(Sums.VOCABULARY, Sums.LAYOUT, dataclasses.replace(trainer.settings, budget="plain"))
    ours, theirs = (jax.jit(jax.grad(t.loss, has_aux=True))(state.variables, episodes)[0] for t in (trainer, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), ours, theirs)


def test_the_entropy_bonus_has_the_gradient_of_the_entropy_of_actions():
    """By enumeration: the expectation of the estimate's gradient over all actions is the gradient of the entropy."""
    policy = Policy(vocabulary=2, operations=2, argument_slots=2, features=4)
    keys, states = jax.random.normal(jax.random.key(0), (1, 3, 4), jnp.float32), jnp.ones((1, 1, 4), jnp.float32)
    actions = [(0, a, b) for a in range(3) for b in range(3)] + [(1, a, 0) for a in range(3)]
    count = len(actions)
    taken = pad([Stream(Layout(2, 1, 1, 3, 1, 2, 2))] * count, Layout(2, 1, 1, 3, 1, 2, 2))._replace(
        operations=np.array([[a[0]] for a in actions], np.int32),
        arguments=np.array([[a[1:]] for a in actions], np.int32),
        argument_masks=np.array([[[[True] * 3, [a[0] == 0] * 3]] for a in actions]),
    )
    many = [jnp.tile(leaf, (count, 1, 1)) for leaf in (states, keys)]
    variables = policy.init(jax.random.key(1), *many, taken, method="judge")

    def exact(variables):
        log_p = policy.apply(variables, *many, taken, method="judge").log_probability
        return -jnp.sum(jnp.exp(log_p) * log_p)

    def estimated(variables):
        choice = policy.apply(variables, *many, taken, method="judge")
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(choice.log_probability)) * choice.entropy)

    np.testing.assert_allclose(exact(variables), estimated(variables), rtol=1e-5)
    # The part of the entropy's gradient that comes from choosing operations is in `score` of each later argument, and
    # the operation's own entropy is exact.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.grad(exact)(variables),
        jax.grad(estimated)(variables),
    )


def test_double_and_add_improves_within_a_few_updates():
    arena, trainer, state = small_trainer()
    tasks = [arena.domain.task(int(n)) for n in np.random.default_rng(0).integers(3, 64, 16)]
    lessons = [arena.replay(task, teacher_actions(task, bidirectional=True)) for task in tasks]
    losses = []
    for number in range(40):
        batch = pad([lessons[(4 * number + row) % 16] for row in range(4)], trainer.layout)
        state, metrics = trainer.update(state, batch)
        losses.append(float(metrics["nats"]))
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4]), losses


def test_reinforce_prefers_what_is_rewarded_and_needs_more_than_one_rollout():
    trainer, state = sums_trainer()
    solved = []
    for number in range(30):
        games = [[Sums(number) for _ in range(4)]]
        state, metrics = reinforce(trainer, state, games, jax.random.key(number))
        solved.append(metrics["solved"])
    assert np.mean(solved[-8:]) > np.mean(solved[:8]) + 0.1, solved
    np.testing.assert_allclose(leave_one_out(np.array([[1.0, 0.0, 0.0]])), [[1.0, -0.5, -0.5]])
    with pytest.raises(ValueError, match="at least two"):
        leave_one_out(np.ones((3, 1)))


def test_checkpoints_restore_what_was_saved(tmp_path):
    _, state = sums_trainer()
    changed = jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), state)
    save(tmp_path / "run", changed, 3)
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "run", state), changed)
    with pytest.raises(ValueError, match="has no checkpoint"):
        restore(tmp_path / "none", state)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lessons_of_double_and_add_fit_their_layout_and_solve(encoding, bidirectional):
    arena, rng = Arena(DoubleAndAdd(), 24, bidirectional, encoding), np.random.default_rng(0)
    for _ in range(20):
        task, actions = arena.domain.teacher_episode(rng, bidirectional)
        game = arena.game(task)
        game.begin()
        for action in actions:
            assert not game.over
            game.play(action.operation, action.arguments)
        assert game.solved
        assert len(game.stream.chunks) <= arena.layout.chunks
        pad([game.stream], arena.layout)


def test_the_long_version_asks_for_the_bit_that_was_read_first():
    episodes = long_version.episodes(32, 16, 64, np.random.default_rng(0))
    first = episodes.tokens[0, :, 0] - long_version.FIRST_BIT
    np.testing.assert_array_equal(episodes.operations[:, 0] == 2, first == 1)
    assert len(episodes.tokens) == 4 * 32 // 16  # the target, and after each decision
    with pytest.raises(ValueError, match="multiple of it"):
        long_version.layout_of(40, 32)


def test_truncation_takes_the_first_bit_from_the_gradient():
    """The gradient of the tokens' embeddings, for a decision that depends on the first of two windows."""
    episodes = long_version.episodes(8, 4, 4, np.random.default_rng(0))
    first = episodes._replace(weights=np.asarray(episodes.weights) * (np.arange(3) == 0))
    first = first._replace(tokens=np.concatenate([np.full_like(first.tokens[:1], 9), first.tokens[1:]]))
    found = {}
    for truncate in (False, True):
        settings = dataclasses.replace(SMALL, truncate=truncate, budget=None)
        trainer = Trainer(long_version.VOCABULARY, long_version.layout_of(8, 4), settings)
        gradient = jax.jit(jax.grad(trainer.loss, has_aux=True))(trainer.first_state().variables, first)[0]
        found[truncate] = np.abs(gradient["params"]["reader"]["cell"]["token"]["embedding"]["embedding"][9]).max()
    assert found[False] > 1e-6
    assert found[True] == 0


@pytest.mark.slow
def test_temporaries_are_flat_in_length_but_for_states_of_chunks():
    small = Settings(batch=2, features=16, budget="1MiB")
    short, long = (memory.measure(length, 32, small) for length in (2048, 16384))
    assert long.plain_bytes > 6 * short.plain_bytes
    assert long.budget_bytes < 2**20 + 5 * long.states_bytes
    assert short.budget_bytes < 2**20 + 5 * short.states_bytes
    with pytest.raises(ValueError, match="100 tokens are 4 chunks, but 12 decisions and a task need more"):
        memory.measure(100, 32, small)


def test_update_gates_are_set_for_the_horizon():
    _, _, state = small_trainer()
    bias = remember(state.variables, 100, jax.random.key(0))["params"]["reader"]["cell"]["token"]["gru"]["iz"]["bias"]
    assert 0 <= bias.min() <= bias.max() <= np.log(200)
