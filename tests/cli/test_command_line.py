"""`python -m bptt_jax`: what it prints, what it draws, and how it fails."""

import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

import bptt_jax
from bptt_jax import StepProfile, make_plan
from bptt_jax._bench.comparison import Comparison, Row, _best_nests
from bptt_jax._bench.floor import product_flops
from bptt_jax._bench.peers import Program, checkpointed_step, compare, equinox, evaluations, nest, ours
from bptt_jax._bench.report import caption, plot, table
from bptt_jax._cli.commands import main
from bptt_jax.plans import notation, parse

PLAN = ["plan", "--length", "1000", "--carry", "32KiB", "--residual", "190KiB", "--budget", "10MiB"]
BENCH = ["bench", "--cell", "lstm", "--size", "2x8", "--length", "36", "--seconds", "0.01"]


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_plan_prints_the_plan_its_cost_and_its_timeline():
    found = run(*PLAN)
    assert found.exit_code == 0
    profile = StepProfile(carry_bytes=32 * 1024, residual_bytes=190 * 1024)
    plan = make_plan(profile, 1000, "10MiB")
    cost = bptt_jax.cost(plan, profile)
    assert notation(plan) in found.output
    assert f"{cost.peak_bytes:,} bytes" in found.output
    assert f"{cost.forward_steps:,} for 1,000" in found.output
    assert "backward 0.." in found.output


def test_plan_draws(tmp_path):
    found = run(*PLAN, "--svg", tmp_path / "plan.svg", "--png", tmp_path / "plan.png")
    assert found.exit_code == 0, found.output
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"--budget": "1KiB"}, 1, r"the smallest that would do is budget=\d+"),
        ({"--budget": "5 parsecs"}, 2, "'5 parsecs' is not a budget here: use bytes such as 4096, .*, 5% or none"),
        ({"--budget": "auto"}, 2, "'auto' is not a budget here"),
        ({"--budget": "0"}, 2, "'0' is not a budget here"),
        ({"--budget": "None", "--length": "-3"}, 2, "-3 is not in the range x>=1"),
        ({"--carry": "5%"}, 2, "'5%' is not a size: use bytes such as 4096, 32KiB"),
        ({"--carry": "-4"}, 2, r"'-4' is not a size: use bytes such as 4096, 32KiB, 190kB or 1.5MiB, or 0\."),
        ({"--residual": "many"}, 2, "'many' is not a size"),
        ({"--length": "0"}, 2, "0 is not in the range x>=1"),
        ({"--svg": "/no/such/folder/plan.svg"}, 2, "there is no directory /no/such/folder to write plan.svg into"),
        ({"--svg": "plan.jpg"}, 2, "'plan.jpg' is no file name that ends in .svg"),
        ({"--png": "plan"}, 2, "'plan' is no file name that ends in .png"),
    ],
)
def test_plan_says_what_is_wrong(change, code, message):
    options = dict(zip(PLAN[1::2], PLAN[2::2], strict=True)) | change
    found = run("plan", *(word for pair in options.items() for word in pair))
    assert found.exit_code == code
    assert "predicted time" not in found.output
    assert re.search(message, " ".join(found.output.split()))


def test_help_has_examples_that_run(tmp_path, monkeypatch):
    shown = run("plan", "--help").output
    examples = re.findall(r"python -m bptt_jax (plan .*)", shown)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    assert all(run(*example.split()).exit_code == 0 for example in examples)
    assert (tmp_path / "plan.png").exists()


@pytest.mark.slow
def test_bench_measures_every_method(tmp_path):
    found = run(*BENCH, "--budget", "70%", "--budget", "1kB", "--budget", "none", "--vmap", "--json",
                tmp_path / "found.json", "--plot", tmp_path / "found.png")  # fmt: skip
    assert found.exit_code == 0, found.output
    (comparison,) = json.loads((tmp_path / "found.json").read_text())
    rows = {row["method"]: row for row in comparison["rows"]}
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert {"lax.scan", "scan(checkpoint(step))", "Equinox, 10 slots", "bptt_jax, no budget"} <= rows.keys()
    assert next(iter(rows)) == "lax.scan"
    assert any(method.startswith("nest ") for method in rows)
    assert rows["lax.scan"]["time_ratio"] == 1
    assert rows["lax.scan"]["forward_steps"] == 36
    assert rows["scan(checkpoint(step))"]["forward_steps"] == 72
    assert 36 < rows["bptt_jax, 70%"]["forward_steps"] <= 108
    assert rows["bptt_jax, 70%"]["temp_bytes"] < rows["lax.scan"]["temp_bytes"]
    assert rows["bptt_jax, 1kB"]["error"].startswith("the smallest budget is ")
    assert rows["bptt_jax, 1kB"]["time_ratio"] is None
    assert rows["bptt_jax, no budget"]["check_seconds"] == 0
    assert rows["bptt_jax, 70%"]["check_seconds"] > 0
    assert (
        bptt_jax.cost(parse(rows["bptt_jax, 70%"]["plan"]), StepProfile(1, 1)).forward_steps
        == (rows["bptt_jax, 70%"]["forward_steps"])
    )
    for unbounded in ("lax.scan, unroll=4", "lax.scan, vmap", "bptt_jax, no budget, vmap"):
        assert rows[unbounded]["forward_steps"] == 36
        assert rows[unbounded]["time_ratio"] > 0
    assert 36 < rows["bptt_jax, 70%, vmap"]["forward_steps"] <= 108
    assert rows["bptt_jax, 70%, vmap"]["temp_bytes"] < rows["lax.scan, vmap"]["temp_bytes"]
    assert rows["bptt_jax, 1kB, vmap"]["error"].startswith("the smallest budget is ")
    assert {row["launches"] for row in rows.values()} == {None}  # as a GPU is not here, nor asked for
    assert comparison["launches_device"] == ""
    # Three products of x and three of the carry in each step: one forwards, two backwards; but no gradient of xs.
    assert comparison["product_flops"] == 36 * 2 * (2 * 8 * 32) * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--size", "16"], "'16' is not a size: use batch x width, such as 16x256"),
        (["--budget", "many"], "'many' is not a budget here: use bytes such as 4096, 32KiB, 190kB or 1.5MiB, 5%, auto"),
        (["--cell", "transformer"], "'transformer' is not one of 'lstm'"),
        (["--seconds", "0"], "'0' is not a time: use seconds above 0"),
        (["--seconds", "nan"], "'nan' is not a time"),
        (["--plot", "found.doc"], "found.doc is no picture that can be drawn; use one of ."),
        (["--json", "/no/such/folder/found.json"], "there is no directory /no/such/folder to write found.json into"),
    ],
)
def test_bench_says_what_is_wrong(change, message):
    found = run(*BENCH, *change)
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())


def test_bench_counts_launches_where_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("bptt_jax._bench.targets.h100", lambda: jax.devices()[0])
    found = run(*BENCH, "--budget", "none", "--launches", "--json", tmp_path / "found.json")
    assert found.exit_code == 0, found.output
    (comparison,) = json.loads((tmp_path / "found.json").read_text())
    rows = {row["method"]: row for row in comparison["rows"]}
    assert comparison["launches_device"] == jax.devices()[0].device_kind
    assert rows["lax.scan"]["launches"] > 36
    assert f"{rows['bptt_jax, no budget']['launches']:,}" in found.output
    assert rows["Equinox, 10 slots"]["launches"] is None


def test_bench_says_what_to_install_to_count_launches(monkeypatch):
    monkeypatch.setattr("bptt_jax._bench.targets.is_installed", lambda module: module != "nvidia.cu13")
    found = run(*BENCH, "--launches")
    assert found.exit_code == 1
    message = "--launches: compiling for an H100 needs JAX's CUDA plugins, and nvidia.cu13 cannot be imported; install"
    assert f"{message} them with: python -m pip install 'jax[cuda13]==" in " ".join(found.output.split())


def test_bench_says_what_to_set_where_plugins_are_not_loaded(monkeypatch):
    def no_topology(**options):
        raise NotImplementedError(f"topology not implemented for {options['platform']}")

    monkeypatch.setattr("bptt_jax._bench.targets.missing_plugins", list)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", no_topology)
    found = run(*BENCH, "--launches")
    assert found.exit_code == 1
    assert "--launches: JAX has not loaded its CUDA plugins" in found.output
    assert "set JAX_PLATFORMS=cpu" in " ".join(found.output.split())


def test_evaluations_are_counted():
    # Equinox records each step once and runs it again for that: two for each step where every carry has a slot.
    assert evaluations(jax.lax.scan, 12) == 12
    assert evaluations(checkpointed_step, 12) == evaluations(nest(3, 4), 12) == 24
    assert evaluations(ours(budget=None), 12) == 12
    assert evaluations(equinox(12), 12) >= 23


def test_products_are_counted_in_loops_and_branches():
    def f(w, x):
        def step(carry, _):
            return jax.lax.cond(carry.sum() > 0, lambda: carry @ w, lambda: carry @ w @ w), None

        return jax.lax.scan(step, x, None, 5)[0]

    assert product_flops(jax.make_jaxpr(f)(jnp.ones((4, 4)), jnp.ones((3, 4))).jaxpr) == 5 * 2 * 2 * 3 * 4 * 4
    image, kernel = jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 5))
    convolution = lambda image: jax.lax.conv_general_dilated(  # noqa: E731
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert product_flops(jax.make_jaxpr(convolution)(image).jaxpr) == 2 * (2 * 9 * 9 * 5) * 27


def test_only_nests_that_none_betters_are_shown():
    rows = [
        Row("lax.scan", 100, seconds=1.0),
        Row("nest 2x6", 30, seconds=1.4),
        Row("nest 3x4", 20, seconds=1.3),
        Row("nest 4x3", 10, seconds=1.5),
        Row("nest 6x2", 10, seconds=1.5),  # a tie: neither betters the other
        Row("bptt_jax, 5%", 10, seconds=1.0),
    ]
    shown = ["lax.scan", "nest 3x4", "nest 4x3", "nest 6x2", "bptt_jax, 5%"]
    assert [row.method for row in _best_nests(rows)] == shown


def out_of_memory():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwith a long list")


def test_what_does_not_fit_the_device_is_a_row_and_the_others_are_measured(tmp_path):
    good, bad = (Program(name, run, (), 8, 0.1) for name, run in (("good", lambda: 0), ("bad", out_of_memory)))
    found = compare([bad, good], good, 0.001)
    assert [run.error for run in found.candidates] == ["RESOURCE_EXHAUSTED: Out of memory", ""]
    assert found.candidates[1].ratio > 0
    found = compare([good], bad, 0.001)
    assert found.baseline.error == "RESOURCE_EXHAUSTED: Out of memory"
    assert math.isinf(found.ratios[0])
    assert 0 < found.candidates[0].seconds < 1
    rows = (Row("lax.scan", 0, error="RESOURCE_EXHAUSTED"), Row("bptt_jax, 5%", 10, seconds=0.5))
    comparison = Comparison("wave", 1, 8, 10, "cpu", "0", 0, 1.0, rows)
    assert [column._cells[1] for column in table(comparison).columns][2:5] == ["–", "500 ms", "–"]
    with pytest.raises(ValueError, match=r"lax\.scan does not run here, .*: RESOURCE_EXHAUSTED"):
        plot(comparison, tmp_path / "none.png")


def test_steps_without_products_have_no_floor():
    comparison = Comparison("wave", 1, 8, 10, "cpu", "0", 0, 1.0, (Row("lax.scan", 100, 1.0, 0.5, forward_steps=10),))
    assert "products" not in caption(comparison)
    assert [column._cells[0] for column in table(comparison).columns][5] == "–"
    assert math.isinf(Row("failed").seconds)


def test_the_module_runs_and_says_what_to_install_without_click():
    program = "import sys, runpy; sys.modules['click'] = None; runpy.run_module('bptt_jax', run_name='__main__')"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert "needs click; install it with: python -m pip install 'bptt_jax[cli]'" in found.stderr
    found = subprocess.run([sys.executable, "-m", "bptt_jax", "--version"], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0
    assert "0.1.0" in found.stdout


def test_a_plan_with_carries_on_the_host():
    done = run(*PLAN[:-1], "2MiB", "--host-budget", "10MiB")
    assert done.exit_code == 0
    assert "on the host" in done.output
    assert "@[" in done.output
    refused = run(*PLAN, "--host-budget", "auto")
    assert refused.exit_code == 2
    assert "'auto' is not a budget here" in refused.output
