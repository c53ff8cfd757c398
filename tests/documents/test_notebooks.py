"""The notebooks run at a small setting, and are committed with what they show at the full one."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
# What the cell tagged "parameters" is followed by. Nothing here is a claim: those are for the full setting.
SMALL = {
    "01_first_steps": {"LENGTH": 300, "BATCH": 2, "WIDTH": 16, "BUDGET": "60%", "BUDGETS": ["60%", "90%"]},
    "02_the_paper": {"LENGTHS": [2, 50, 400], "MIXED_LENGTHS": [2, 20, 60], "ROUNDS": 1},
    "03_memory_against_time": {
        "CELLS": ["lstm"], "SIZE": "2x8", "LENGTH": 36, "SECONDS": 0.01, "BUDGETS": ["70%", "none"],
    },
    "04_long_sequences": {"LENGTH": 120, "BATCH": 2, "WIDTH": 4, "SYMBOLS": 2, "UPDATES": 20, "BUDGET": "60%"},
    "05_beyond_rnns": {"SIDE": 16, "STEPS": 200, "ITERATIONS": 3, "BUDGET": "1.5MiB"},
    "06_bigger_than_memory": {
        "LENGTH": 120, "BATCH": 2, "WIDTH": 8, "SYMBOLS": 16, "LIMITS": ["250KiB", "10KiB"], "WITHIN": "200KiB",
        "UPDATES": 2, "HOST_LENGTH": 200, "HOST_BATCH": 2, "HOST_WIDTH": 16, "HOST_BUDGETS": ["20%", "50%", "70%"],
        "MANY_STEPS": 1000,
    },
}  # fmt: skip


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def assigned(source):
    """The names that a cell assigns."""
    for statement in ast.parse(source).body:
        for target in statement.targets if isinstance(statement, ast.Assign) else ():
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def test_each_notebook_has_a_small_setting():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.one_in(11)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of Jupyter's client
def test_it_runs_at_a_small_setting(name, tmp_path):
    notebook = read(name)
    (at,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert set(SMALL[name]) <= set(assigned(notebook.cells[at].source))
    assignments = "\n".join(f"{parameter} = {value!r}" for parameter, value in SMALL[name].items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(assignments))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.parametrize("name", SMALL)
def test_it_is_committed_with_plots_and_without_walls_of_text(name):
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert max(len(output.text.splitlines()) for output in outputs if output.output_type == "stream") <= 60
    assert "Traceback" not in json.dumps(outputs)
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_full_backpropagation_learns_what_truncation_at_equal_memory_does_not():
    """As committed; the small setting of the other test is too short to show it."""
    text = "".join(
        output.text
        for cell in read("04_long_sequences").cells
        for output in cell.get("outputs", [])
        if "text" in output
    )
    mib = [float(found) for found in re.findall(r"([\d.]+) MiB", text)]
    full, truncated = (float(found) for found in re.findall(r"([\d.]+)% of \d+ new sequences", text))
    assert len(mib) == 3
    assert mib[2] <= mib[1] < 0.05 * mib[0]
    assert full >= 95
    assert truncated < 20  # of eight symbols 12.5 are chance
