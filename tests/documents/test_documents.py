"""What the README and the examples say, run."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner

import bptt_jax
from bptt_jax import errors, linen, nnx, planners, plans
from bptt_jax._cli.commands import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def lax_modes():
    """As a user has them: single precision, standard promotion."""
    for name, value in [
        ("jax_enable_x64", False),
        ("jax_numpy_dtype_promotion", "standard"),
        ("jax_numpy_rank_promotion", "allow"),
    ]:
        jax.config.update(name, value)


def without_measurement(report):
    """A report without what depends on the version of XLA and on the machine."""
    left_out = ("measured", "planning", "check ")
    return [line.rstrip() for line in report.splitlines() if line.strip() and not line.startswith(left_out)]


def test_readme_code_runs_and_prints_what_it_shows(lax_modes, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|text)\n(.*?)```", README, flags=re.DOTALL)
    assert [kind for kind, _ in blocks].count("text") == 1
    namespace = {}
    for kind, text in blocks:
        if kind == "python":
            capsys.readouterr()
            exec(compile(text, "README.md", "exec"), namespace)
        else:
            assert without_measurement(capsys.readouterr().out) == without_measurement(text)
    assert namespace["accuracy"] > 0.85  # "some 90 % right"
    assert (tmp_path / "plan.png").exists()


def test_readme_commands_are_those_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    python -m bptt_jax (plan|bench) (.*)$", README, flags=re.MULTILINE)
    assert {name for name, _ in commands} == {"plan", "bench"}
    for name, options in commands:
        command = main.commands[name]
        command.make_context(name, options.split())  # reads the options
        if name == "plan":
            assert CliRunner().invoke(main, [name, *options.split()]).exit_code == 0
    assert (tmp_path / "plan.svg").exists()


def test_readme_before_and_after_is_short():
    first = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
    assert len(first.splitlines()) <= 12


def test_byte_lm_learns_and_reports():
    options = ["--length", "300", "--batch", "4", "--width", "32", "--steps", "12", "--budget", "30%"]
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "byte_lm.py", *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after 12 steps", run.stdout).groups())
    assert after < before - 1
    plain, ours = (float(size) for size in re.findall(r"([\d.]+) MiB", run.stdout))
    assert ours < plain


def test_byte_lm_refuses_nonsense():
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "byte_lm.py", "--steps", "0"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2
    assert "--steps must be at least 1, got 0" in run.stderr


def public_objects():
    """Everything that users import, by name, without what comes from elsewhere."""
    doors = [bptt_jax, linen, nnx, planners, planners.exact, planners.paper, plans]
    for door in doors:
        for name in getattr(door, "__all__", [name for name in vars(door) if not name.startswith("_")]):
            found = getattr(door, name)
            if callable(found) and found.__module__.startswith("bptt_jax"):
                yield pytest.param(found, id=f"{door.__name__}.{name}")
    yield pytest.param(errors.BudgetError, id="bptt_jax.errors.BudgetError")


@pytest.mark.parametrize("documented", list(public_objects()))
def test_each_public_docstring_has_an_example(documented):
    """That it runs is tested where it stands."""
    assert ">>> " in documented.__doc__
