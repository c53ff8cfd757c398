"""The comparison of JAX's own tests, on a small file in the place of JAX's."""

import pytest

from tests.support.jax_scan_tests import NEEDED, main

# Four ways in which a test gets at the scan, of which each fails with `bptt_jax.scan` only; and one test that fails
# with both, one that is skipped, and one of another name.
TESTS = """
from functools import partial

import jax
import jax.numpy as jnp
from absl.testing import parameterized
from jax import lax

SCANS = [(lax.scan, "plain"), (partial(lax.scan, unroll=2), "partly"), (lambda *a: lax.scan(*a), "later")]
step = lambda carry, x: (carry + x, carry * x)


class Tests(parameterized.TestCase):
    def test_scan_of_numbers(self):
        self.assertEqual(lax.scan(step, jnp.float32(0), jnp.arange(3, dtype=jnp.float32))[0], 3)

    def test_private(self):
        self.fail("not selected")

    @parameterized.named_parameters(
        *({"testcase_name": f"_{name}", "scan": scan} for scan, name in SCANS),
        {"testcase_name": "_attribute", "scan": lambda *a: jax.lax.scan(*a)},
    )
    def test_names_of_Scan(self, scan):
        jaxpr = jax.make_jaxpr(partial(scan, step))(jnp.float32(0), jnp.ones(4, jnp.float32))
        self.assertEqual([eqn.primitive.name for eqn in jaxpr.eqns], ["scan"])

    def test_scan_of_nothing(self):
        raise ValueError("first\\nsecond")

    def test_scan_of_gradient(self):
        loss = lambda xs: lax.scan(step, jnp.float32(0), xs)[1].sum()
        self.assertLen(jax.grad(loss)(jnp.ones(4, jnp.float32)), 4)

    def test_scan_later(self):
        self.skipTest("not run")
"""
PRIVATE = [f"test_names_of_Scan_{name}" for name in ("attribute", "later", "partly", "plain")]
OF_NAMES = "AssertionError: Lists differ: ['bptt_scan'] != ['scan']"


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake_test.py"
    path.write_text(TESTS)
    return str(path)


def test_says_what_it_needs(capsys, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("")
    for arguments in [], [str(tmp_path / "absent.py")], [str(other)]:
        assert main(arguments) == 2
        assert capsys.readouterr().out == f"{NEEDED}\n"
    assert "lax_control_flow_test.py" in NEEDED


def test_tells_failures_of_ours_only(capsys, fake):
    assert main([fake]) == 1
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        f"{'run':<40}{7:>5}",
        f"{'jax.lax.scan fails':<40}{1:>5}",
        "    test_scan_of_nothing: ValueError: first",
        f"{'bptt_jax.scan only fails':<40}{4:>5}",
        *(f"    {name}: {OF_NAMES}" for name in PRIVATE),
        f"{'bptt_jax.scan only fails, as expected':<40}{0:>5}",
    ]


def test_expects_failures_that_look_into_the_equation(capsys, fake, monkeypatch):
    monkeypatch.setattr("tests.support.jax_scan_tests.EXPECTED", dict.fromkeys(PRIVATE, OF_NAMES))
    assert main([fake]) == 0
    assert f"{'bptt_jax.scan only fails, as expected':<40}{4:>5}" in capsys.readouterr().out


@pytest.mark.parametrize("lowering", ["nested", "sweep"])
def test_passes_on_a_budget(capsys, fake, lowering):
    main([fake, "--budget", "1B", "--lowering", lowering])
    assert "test_scan_of_gradient: bptt_jax.errors.BudgetError: " in capsys.readouterr().out
