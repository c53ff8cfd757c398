"""The architecture: a module imports only from lower rows, the pure rows import no JAX, and one door leads in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bptt_jax

PACKAGE = Path(bptt_jax.__file__).parent

# Rows from the bottom up. The first eleven are pure: plain Python and NumPy.
ROWS = [
    ["errors", "_plan", "_step_profile", "_budget"],
    ["_notation", "_simulate", "_figures", "_cost_rules"],
    ["_time", "_nested_cost", "_sweep_cost"],
    ["_cost", "_render", "_picture"],
    ["plans"],
    ["planners._tables"],
    ["planners.paper", "planners.exact", "planners.sweep", "planners._reach"],
    ["planners._search"],
    ["planners._smallest"],
    ["planners.compiled"],
    ["planners"],
    ["_lower", "_device", "_primitives"],
    ["_lower.jaxprs", "_lower.style", "_processes"],
    ["_free_bytes"],
    ["_device.machine"],
    ["_options"],
    ["_along"],
    ["_step"],
    ["_trace"],
    ["_active"],
    ["_gradient"],
    ["_lower.differentiated", "_lower.by_index", "_lower.block_values"],
    ["_lower.nested", "_lower.plain", "_lower.merge", "_lower.pull", "_lower.taps"],
    ["_lower.split"],
    ["_lower.step_vjp"],
    ["_lower.block_sizes", "_lower.partial_sums"],
    ["_lower.swept"],
    ["_lower.block"],
    ["_lower.walk"],
    ["_lower.sweep"],
    ["_lower.program"],
    ["_temporaries"],
    ["_measure"],
    ["_check"],
    ["_verify"],
    ["_choose"],
    ["_primitives.expansion"],
    ["_primitives.gradient", "_primitives.direct"],
    ["_primitives.scan"],
    ["_scan", "_report"],
    ["_explain"],
    ["_recurrent", "_cells", "_share_budget"],
    ["linen._class", "linen._lift", "linen._stack", "nnx._class", "nnx._lift", "nnx._stack"],
    ["linen._layer", "nnx._layer"],
    ["linen", "nnx"],
    ["_bench"],
    ["_bench.cells", "_bench.floor"],
    ["_bench.peers"],
    ["_bench.comparison"],
    ["_bench.report"],
    ["_arguments"],
    ["_cli"],
    ["__main__"],
    [""],
]
PURE_ROWS = 11
WITHIN_A_ROW = {("_step_profile", "_plan")}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def row_of(name):
    return next(number for number, row in enumerate(ROWS) if name in row)


def imports(source):
    """The modules that a source imports, as absolute dotted names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(name, source):
    """What a module imports against the direction of the rows."""
    found = []
    for target in imports(source):
        root, _, inner = target.partition(".")
        if root in ("jax", "jaxlib", "flax", "optax") and row_of(name) < PURE_ROWS:
            found.append(f"{name} is pure and imports {target}")
        if target.startswith(("jax._src", "flax.core.lift")):
            found.append(f"{name} imports the private {target}")
        known = any(inner in row for row in ROWS)
        package_of_itself = name == inner or name.startswith(f"{inner}.")
        if root == "bptt_jax" and inner and known and not package_of_itself:
            allowed = row_of(inner) < row_of(name) or (name, inner) in WITHIN_A_ROW
            if not allowed:
                found.append(f"{name} imports {inner}, which is not below it")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_point_downwards(path):
    assert violations(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("_cost", "def f():\n    import jax.numpy as jnp"),
        ("planners.compiled", "from jax import lax"),
        ("_plan", "from bptt_jax._cost import cost"),
        ("_measure", "from bptt_jax import _scan"),
        ("_scan", "from jax._src import core"),
    ],
)
def test_planted_violations_are_found(name, source):
    assert len(violations(name, source)) >= 1


def test_public_names():
    assert sorted(bptt_jax.__all__) == [
        "Chain",
        "PlanCost",
        "Remat",
        "Repeat",
        "Report",
        "StepProfile",
        "StepTimes",
        "Steps",
        "checkpointed",
        "cost",
        "errors",
        "explain",
        "make_plan",
        "planners",
        "plans",
        "profile",
        "scan",
    ]
    public = {name for name in vars(bptt_jax) if not name.startswith("_")} - {"linen", "nnx", "importlib", "Any"}
    assert public == set(bptt_jax.__all__)
    assert {"scan", "linen", "nnx"} <= set(dir(bptt_jax))
    with pytest.raises(AttributeError, match="module 'bptt_jax' has no attribute 'sacn'"):
        bptt_jax.sacn  # noqa: B018  the access is the test


def test_works_without_flax():
    program = """
import sys
sys.modules["flax"] = sys.modules["flax.linen"] = sys.modules["flax.nnx"] = None
import bptt_jax
for name in ("linen", "nnx"):
    try:
        getattr(bptt_jax, name)
    except ImportError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for name in ("linen", "nnx"):
        assert f"bptt_jax.{name} needs Flax; install it with: python -m pip install 'bptt_jax[flax]'" in run.stdout
