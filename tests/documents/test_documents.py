"""READMEs and examples are run: all code, all commands, and output as it is shown."""

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
FOLDERS = ("notebooks", "examples", "bptt_jax", "bptt_jax/planners", "tests", "tests/audit", "tests/bench")
GUIDE = "notebooks/README.md"


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


def run_code(path, capsys):
    """Runs the code of a Markdown file and compares each text block with the output before it.

    Returns:
      The namespace of all the code, and the output of each block.
    """
    namespace, outputs = {}, []
    blocks = re.findall(r"^```(\w.*?)?\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert {kind for kind, _ in blocks} <= {"", "python", "text"}
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, str(path), "exec"), namespace)
            outputs.append(capsys.readouterr().out)
        elif kind == "text":
            assert without_measurement(outputs[-1]) == without_measurement(text)
    return namespace, outputs


@pytest.mark.slow
def test_readme_code_runs_and_prints_what_it_shows(lax_modes, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, outputs = run_code(ROOT / "README.md", capsys)
    assert README.count("```text") == 1
    (error,) = [output for output in outputs if output.startswith("no plan for")]
    shown = re.search(r"\n((?:    [^\n]+\n)*?    no plan for a scan(?:[^\n]+\n)+)", README)[1]
    assert re.sub(r"[\d.,]+", "", " ".join(shown.split())) == re.sub(r"[\d.,]+", "", error.strip())  # XLA's numbers


@pytest.mark.slow
def test_the_guides_code_runs_and_prints_what_it_shows(lax_modes, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, _ = run_code(ROOT / GUIDE, capsys)
    assert namespace["accuracy"] > 0.85  # "some 90 % right"
    assert (tmp_path / "plan.png").exists()


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if f"{folder}/README.md" != GUIDE])
def test_code_of_a_folders_readme_runs(folder, lax_modes, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, _ = run_code(ROOT / folder / "README.md", capsys)
    assert bool(namespace) == (folder == "bptt_jax/planners")  # the others have commands only


@pytest.mark.parametrize("folder", ["", *FOLDERS])
def test_links_lead_somewhere(folder):
    text = (ROOT / folder / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / folder / target).exists(), target


@pytest.mark.parametrize("folder", ["", *FOLDERS])
def test_paths_that_are_named_exist(folder):
    text = (ROOT / folder / "README.md").read_text()
    named = re.findall(r"\b(?:tests|bptt_jax|examples|notebooks)/[\w/]+\.(?:py|ipynb|md)\b", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


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


@pytest.mark.parametrize("more", [[], pytest.param(["--loss-outside"], marks=pytest.mark.slow)], ids=str)
def test_byte_lm_learns_and_reports(more):
    options = ["--length", "300", "--batch", "4", "--width", "32", "--steps", "12", "--budget", "30%"]
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "byte_lm.py", *options, *more],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after 12 steps", run.stdout).groups())
    assert after < before - 1
    plain, ours = (float(size) for size in re.findall(r"([\d.]+) MiB", run.stdout))
    assert ours < plain * (0.3 if not more else 1)


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
