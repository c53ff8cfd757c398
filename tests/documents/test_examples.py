"""What examples promise: training goes on where it was killed, budgets are kept, and losses are the same anywhere."""

import functools
import re
import signal
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from examples import byte_lm
from tests.support import comparison

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "resumable.py"
STEPS, SAVE_EVERY = 30, 10
SMALL = ["--steps", STEPS, "--save-every", SAVE_EVERY, "--length", 60, "--batch", 4, "--width", 8, "--budget", "60%"]


def train(directory, *options):
    command = [sys.executable, EXAMPLE, "--directory", directory, *map(str, (*SMALL, *options))]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def final_loss(run):
    assert run.returncode == 0, run.stderr
    return re.search(rf"after {STEPS} steps: (\d\S+)$", run.stdout.strip())[1]


def resumed_after(run):
    """The step of the checkpoint that a run went on from, None if it began anew."""
    found = re.search(r"resuming after step (\d+)", run.stdout)
    return found and int(found[1])


def checkpoint(directory, step):
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True)) as checkpoints:
        return checkpoints.restore(step, args=ocp.args.StandardRestore())


@pytest.mark.slow
def test_killed_and_resumed_training_equals_an_unbroken_run(tmp_path):
    unbroken = train(tmp_path / "unbroken")
    # Killed when a save has just begun, in the background: whether it was finished is left to chance.
    while_saving = train(tmp_path / "killed", "--kill-at", 2 * SAVE_EVERY)
    between_saves = train(tmp_path / "killed", "--kill-at", 2 * SAVE_EVERY + 5)
    resumed = train(tmp_path / "killed")

    for killed in (while_saving, between_saves):
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert "held-out" not in killed.stdout
    assert resumed_after(unbroken) is resumed_after(while_saving) is None
    for later in (between_saves, resumed):  # a save begins when the one before is finished, so the first is there
        assert resumed_after(later) in (SAVE_EVERY, 2 * SAVE_EVERY)
    assert final_loss(resumed) == final_loss(unbroken)

    ours, theirs, earlier = (
        checkpoint(tmp_path / name, step) for name, step in [("killed", 30), ("unbroken", 30), ("unbroken", 20)]
    )
    assert ours["step"] == STEPS
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(AssertionError):  # the comparison can fail: training changes what is compared
        jax.tree.map(np.testing.assert_array_equal, ours["variables"], earlier["variables"])

    other_run = train(tmp_path / "killed", "--seed", 1)
    assert other_run.returncode == 1
    assert re.search("holds a run with .*'seed': 0.*these options say .*'seed': 1", other_run.stderr)


def test_an_equinox_model_under_vmap_learns_within_its_budget():
    # Of a scan of 60 steps one block is the half, and what it holds outweighs what is saved without a budget.
    small = ["--batch", 8, "--length", 120, "--width", 16, "--steps", 6, "--budget", "40%"]
    command = [sys.executable, EXAMPLES / "equinox_vmap.py", *map(str, small)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr

    plain, unbounded, bounded = (int(size.replace(",", "")) for size in re.findall(r"([\d,]+) bytes", run.stdout))
    assert unbounded <= plain
    assert bounded <= 0.4 * plain
    losses = [float(loss) for loss in re.findall(r"error ([\d.]+)$", run.stdout, flags=re.MULTILINE)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def fit_memory(*options):
    command = [sys.executable, EXAMPLES / "fit_memory.py", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_training_step_is_fitted_to_a_limit_and_learns():
    run = fit_memory("--within", "900KiB", "--length", 300, "--batch", 4, "--width", 16, "--steps", 12)
    assert run.returncode == 0, run.stderr
    budget = re.search(r"^chosen: program \d, budget=(\d+)$", run.stdout, flags=re.MULTILINE)[1]
    assert f"with a budget of {int(budget):,} bytes" in run.stdout
    shares = [float(share) for share in re.findall(r" (\d\.\d{3})  ", run.stdout)]
    assert max(share for share in shares if share <= 1) >= 0.93
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+), with", run.stdout)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_limit_too_small_for_a_training_step_is_answered():
    run = fit_memory("--within", "200KiB", "--length", 300, "--batch", 4, "--width", 16)
    assert run.returncode == 1
    assert re.search(r"--within: no budget makes the program fit within='200KiB'.*within=\d+ would do", run.stderr)


@pytest.fixture
def flax_promotion():
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")


def test_a_language_model_has_its_loss_in_the_loop_or_behind_it(flax_promotion, monkeypatch):
    cell = functools.partial(nn.OptimizedLSTMCell, param_dtype=jnp.float64)
    monkeypatch.setattr(byte_lm.nn, "OptimizedLSTMCell", cell)
    text = np.random.default_rng(0).integers(0, byte_lm.VOCABULARY, (201, 3))
    inside, plain = byte_lm.LossInside(12, "30%"), byte_lm.LossOutside(functools.partial(nn.RNN, time_major=True), 12)
    params = inside.init(jax.random.key(0), text)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)

    def result_of(model, params):
        loss = jax.value_and_grad(lambda params: byte_lm.loss_of(model, params, text))
        return loss(params), model.apply({"params": params}, text)

    (loss, gradient), losses = result_of(inside, params)
    wanted = result_of(plain, byte_lm.loss_outside(params))
    comparison.assert_same(((loss, byte_lm.loss_outside(gradient)), losses), wanted, tolerance=1e-12)


@pytest.mark.slow
def test_the_language_models_training_step_takes_a_tenth_of_the_bytes(flax_promotion):
    """At the example's own sizes; `python examples/byte_lm.py` has the time as well."""
    jax.config.update("jax_enable_x64", False)
    options = byte_lm.parse_options([])
    plain = byte_lm.LossOutside(functools.partial(nn.RNN, time_major=True), options.width)
    text = jnp.zeros((options.length + 1, options.batch), jnp.int32)

    def temporaries(model):
        optimizer = optax.adam(options.learning_rate)
        params = jax.eval_shape(model.init, jax.random.key(0), text)["params"]
        update = byte_lm.compile_update(model, optimizer, (params, jax.eval_shape(optimizer.init, params)), text)
        return update.memory_analysis().temp_size_in_bytes

    assert temporaries(byte_lm.make_model(options)) <= 0.1 * temporaries(plain)
