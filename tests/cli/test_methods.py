"""The rows of the comparison: a scan unrolled, scans under `jax.vmap`, and the launches of each program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import bptt_jax
from bptt_jax import StepProfile
from bptt_jax._bench import targets
from bptt_jax._bench.cells import CELLS
from bptt_jax._bench.comparison import Comparison, Row, compiled, count_launches
from bptt_jax._bench.launches import launches
from bptt_jax._bench.methods import Ours, Peer, methods
from bptt_jax._bench.peers import equinox, evaluations, gradient, mapped, nest, ours, unrolled
from bptt_jax._bench.report import caption, plot, table
from bptt_jax.plans import parse
from tests.support.targets import h100, or_skip

LAX = Peer("lax.scan", jax.lax.scan)
PLAN = "(2*[4] + 4)"


@pytest.fixture(autouse=True)
def strict_jax():
    """Instead of the suite's: Equinox promotes."""


def problem_and_xs(cell="lstm", batch=3, length=12):
    problem = CELLS[cell](batch, 4)
    return problem, problem.xs(length)


def test_lax_scan_comes_first_and_vmap_last_where_asked_for():
    names = [method.name for method in methods(36, ["5%", 4096, None])]
    with_vmap = [method.name for method in methods(36, ["5%", 4096, None], vmap=True)]
    assert names[:2] == ["lax.scan", "lax.scan, unroll=4"]
    assert names[-3:] == ["bptt_jax, 5%", "bptt_jax, 4,096 bytes", "bptt_jax, no budget"]
    assert with_vmap[: len(names)] == names
    mapped_too = ["bptt_jax, 5%, vmap", "bptt_jax, 4,096 bytes, vmap", "bptt_jax, no budget, vmap"]
    assert with_vmap[len(names) :] == ["lax.scan, vmap", *mapped_too]


@pytest.mark.parametrize("cell", ["lstm", "flax-gru", "flax-conv-lstm", "sine-gordon"])
@pytest.mark.parametrize("scan", [jax.lax.scan, ours(plan="(2*[2] + 1)")])
def test_examples_mapped_have_the_gradient_of_the_batch(cell, scan):
    problem, xs = problem_and_xs(cell, length=5)
    arguments = problem.params, problem.init, xs
    expected = jax.jit(gradient(problem, jax.lax.scan))(*arguments)
    found = jax.jit(gradient(problem, mapped(scan)))(*arguments)
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-4, atol=1e-6), expected, found))
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(expected))


@pytest.mark.parametrize("method", methods(12, ["50%", None], vmap=True), ids=lambda method: method.name)
def test_one_example_is_scanned_under_vmap_and_else_the_batch(method):
    problem, xs = problem_and_xs(batch=3)
    shapes = set()

    def step(carry, x):
        shapes.add((carry[0].shape, x.shape))
        return problem.step(problem.params, carry, x)

    method.scan_for(None)(step, problem.init, xs)
    batch = 1 if method.name.endswith("vmap") else 3
    assert shapes == {((batch, 4), (batch, 4))}


def test_evaluations_of_new_rows_are_counted():
    assert evaluations(unrolled(4), 12) == evaluations(unrolled(5), 12) == 12
    assert evaluations(mapped(jax.lax.scan), 12) == 12
    assert evaluations(mapped(nest(3, 4)), 12) == 24
    expected = bptt_jax.cost(parse(PLAN), StepProfile(1, 1)).forward_steps
    assert evaluations(mapped(ours(plan=PLAN)), 12) == evaluations(ours(plan=PLAN), 12) == expected > 12


def test_a_budget_under_vmap_is_of_the_whole_batch():
    problem, xs = problem_and_xs(batch=16, length=100)
    whole, _ = compiled(Peer("lax.scan, vmap", mapped(jax.lax.scan)), problem, xs)
    inside, _ = compiled(Ours("30%"), problem, xs)
    program, row = compiled(Ours("30%", vmap=True), problem, xs)
    assert (row.method, row.error) == ("bptt_jax, 30%, vmap", "")
    assert 0.5 * inside.temp_bytes < program.temp_bytes < 0.4 * whole.temp_bytes  # of one example: 1/16 of it
    assert row.forward_steps == bptt_jax.cost(parse(row.plan), StepProfile(1, 1)).forward_steps
    assert row.check_seconds > 0


def test_launches_are_those_of_the_program_that_runs():
    device = jax.devices()[0]

    def count(method, length):
        problem, xs = problem_and_xs(length=length)
        program, _ = compiled(method, problem, xs)
        assert count_launches(method, program, problem, None) is None
        found = count_launches(method, program, problem, device)
        assert found is None or found == launches(program.compiled.as_text())
        return found

    assert count(LAX, 24) - count(LAX, 12) >= 12
    assert count(Ours(None), 12) > 12
    assert count(Peer("Equinox", equinox(4)), 12) is None  # its loop has no known length
    assert count(Ours(1), 12) is None  # no plan fits, so there is no program


def test_launches_of_another_device_are_those_of_a_program_compiled_for_it(monkeypatch):
    device = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda: [])  # so the device is none of this machine's
    problem, xs = problem_and_xs()
    program, _ = compiled(LAX, problem, xs)
    unrelated = dataclasses.replace(program, compiled=None)  # compiled anew, for this is not looked at
    assert count_launches(LAX, unrelated, problem, device) == launches(program.compiled.as_text())
    assert count_launches(Ours(1), program, problem, device) is None  # no plan fits there


def test_launches_on_an_h100_are_of_a_plan_for_it():
    device = or_skip(h100)
    problem, xs = CELLS["lstm"](4, 32), CELLS["lstm"](4, 32).xs(50)

    def count(method):
        program, _ = compiled(method, problem, xs)
        return count_launches(method, program, problem, device)

    assert targets.launches_device(True) is targets.h100()
    assert count(LAX) > 50
    assert count(Ours(None)) < count(LAX)
    assert count(Ours("30%", vmap=True)) == pytest.approx(count(Ours("30%")), rel=0.1)
    assert count(Ours("auto")) is None  # it has no free bytes
    elsewhere = Peer("planned for the CPU", ours())
    assert count(elsewhere) != count(Ours(None))


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_launches_are_counted_on_a_gpu_unless_asked_otherwise(monkeypatch, backend, asked):
    here = jax.devices()[0]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(targets, "h100", lambda: "H100")
    expected = {"cpu": {None: None, False: None, True: "H100"}, "gpu": {None: here, False: None, True: here}}
    assert targets.launches_device(asked) == expected[backend][asked]


def comparison(*rows, device="cpu", launches_device=""):
    return Comparison("wave", 1, 8, 10, device, "0", 0, 1.0, rows, launches_device)


def test_the_table_has_launches_and_says_of_which_device():
    rows = Row("lax.scan", 100, 1.0, 0.5, launches=28_009), Row("Equinox, 10 slots", 100, 1.0, 0.5)
    found = comparison(*rows, launches_device="H100")
    (column,) = (column for column in table(found).columns if column.header == "launches")
    assert list(column.cells) == ["28,009", "–"]
    assert "planned and compiled for an H100" in caption(found)
    assert "launches: kernels and copies that the GPU is sent, where" in caption(
        comparison(device="A", launches_device="A")
    )


def test_launches_that_are_not_counted_have_no_column():
    found = comparison(Row("lax.scan", 100, 1.0, 0.5))
    assert "launches" not in [column.header for column in table(found).columns]
    assert "launches" not in caption(found)


def test_each_way_has_points_of_its_own_in_the_plot():
    names = [method.name for method in methods(36, ["5%", None], vmap=True)]
    axes = plot(comparison(*(Row(name, 10 + i, 1.0, 0.1) for i, name in enumerate(names))))
    points = {line.get_label(): len(line.get_xdata()) for line in axes.get_lines() if line.get_label()[0] != "_"}
    assert sum(points.values()) == len(names)
    assert points["bptt_jax over budgets"] == points["bptt_jax over budgets, vmap"] == 2
    assert points["lax.scan"] == points["lax.scan, unrolled"] == points["lax.scan, vmap"] == 1
