"""The architecture: a module imports from lower rooms only, pure rooms import no JAX, and one door leads in."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import bptt_jax

PACKAGE = Path(bptt_jax.__file__).parent

# Rooms, which are folders or single modules, from the bottom up: each imports from those above it in this list only.
ROOMS = [
    "errors",
    "_caches",
    "_figures",
    "_budget",
    "plans",
    "_cost",
    "planners",
    "_jaxprs",
    "_device",
    "_progress",
    "_options",
    "_trace",
    "_step",
    "_lower",
    "_measure",
    "_verify",
    "_pipeline",
    "_primitives",
    "_scan",
    "_explain",
    "_whole",
    "_recurrent",
    "linen",
    "nnx",
    "_bench",
    "_cli",
    "__main__",
    "",
]
PURE = ROOMS[: ROOMS.index("planners") + 1]  # plain Python and NumPy
MOST_FLAT = 6  # modules of the package whose names begin with an underscore and that are in no folder


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name):
    return name.split(".")[0]


def imports(source):
    """The modules that a source imports, as absolute dotted names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(source):
    """The rooms of this package that a source imports from; its public names are those of the door, ""."""
    of_package = [name.split(".") for name in imports(source) if name.split(".")[0] == "bptt_jax"]
    return {name[1] if name[1:] and name[1] in ROOMS else "" for name in of_package}


def violations(name, source):
    """A module's imports against the direction of the rooms, of JAX in a pure room, and of private API."""
    room, found = room_of(name), []
    for target in imports(source):
        if target.split(".")[0] in ("jax", "jaxlib", "flax", "optax") and room in PURE:
            found.append(f"{name} is pure and imports {target}")
        if target.startswith(("jax._src", "flax.core.lift")):
            found.append(f"{name} imports the private {target}")
    for other in imported_rooms(source) & set(ROOMS) - {room}:
        if ROOMS.index(other) > ROOMS.index(room):
            found.append(f"{name} imports from {other}, which is not below it")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_point_downwards(path):
    assert violations(module_name(path), path.read_text()) == []


@pytest.mark.parametrize("room", [room for room in ROOMS if (PACKAGE / room).is_dir() and room])
def test_no_room_has_circles(room):
    names = {module_name(path): path for path in (PACKAGE / room).rglob("*.py")}
    graph = {
        name: {target.removeprefix("bptt_jax.") for target in imports(path.read_text())} & set(names) - {name, room}
        for name, path in names.items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(names)


def test_every_room_is_in_the_list():
    rooms = {room_of(module_name(path)) for path in PACKAGE.rglob("*.py")}
    assert rooms == set(ROOMS)
    flat = [path for path in PACKAGE.glob("_*.py") if not path.name.startswith("__")]
    assert len(flat) <= MOST_FLAT


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("_cost.cost", "def f():\n    import jax.numpy as jnp"),
        ("planners._make_plan", "from jax import lax"),
        ("plans._nodes", "from bptt_jax._cost.cost import cost"),
        ("_measure.measure", "from bptt_jax import _scan"),
        ("_scan", "from jax._src import core"),
        ("_step.split", "def f():\n    from bptt_jax import scan"),
        ("plans._nodes", "import bptt_jax"),
    ],
)
def test_planted_violations_are_found(name, source):
    assert len(violations(name, source)) >= 1


def test_public_names():
    assert sorted(bptt_jax.__all__) == [
        "Chain",
        "FitReport",
        "PlanCost",
        "Remat",
        "Repeat",
        "Report",
        "Reports",
        "StepProfile",
        "StepTimes",
        "Steps",
        "checkpointed",
        "cost",
        "errors",
        "explain",
        "explain_calls",
        "largest_budget",
        "make_plan",
        "planners",
        "plans",
        "profile",
        "scan",
        "show_recomputation",
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
