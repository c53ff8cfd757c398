"""JAX's own tests of `jax.lax.scan`, run with `jax.lax.scan` as it is and with `bptt_jax.scan` in its place.

Run as

    python -m tests.support.jax_scan_tests PATH_TO_lax_control_flow_test.py [--budget 50%] [--lowering nested|sweep]

The file is JAX's, of the version that is installed, and is not part of this repository. Of its tests those run whose
names contain "scan". The exit code is 1 if one fails with `bptt_jax.scan` only, and is not expected to.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import traceback
import types
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax

import bptt_jax
from tests.support.quick_to_compile import compile_quickly

NEEDED = (
    f"This needs the path of JAX's own tests of control flow, tests/lax_control_flow_test.py of JAX {jax.__version__}, "
    f"from https://github.com/jax-ml/jax/blob/jax-v{jax.__version__}/tests/lax_control_flow_test.py."
)

# Tests that look into what is private to JAX's equation of a scan, with the first line of their error.
EXPECTED = {
    # Looks for the print in jaxpr.eqns[0].params["jaxpr"]. Ours prints once per step too, with other params.
    "test_scan_diff_of_print": "KeyError: 'jaxpr'",
    # Counts jaxpr.eqns[0].params["jaxpr"].jaxpr.outvars. An x returned unchanged stays out of our loop too.
    "test_scan_input_to_output_forwarding": "KeyError: 'jaxpr'",
    # Falsifies params of next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan'). Ours has another name.
    "test_scan_typecheck_param": "StopIteration",
}


class Failures(unittest.TestResult):
    """The first line of the error of each test that fails, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, str] = {}

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        text = "".join(traceback.format_exception_only(err[0], err[1]))
        self.lines.setdefault(name_of(test), next(filter(None, text.splitlines()), "").strip())

    addFailure = addError

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        if err is not None:
            self.addError(test, err)


def name_of(test: unittest.TestCase) -> str:
    """The test's name, with its parameters where JAX names them."""
    return test.id().rpartition(".")[2]


def changed(module: types.ModuleType, **attributes: Any) -> types.ModuleType:
    """A copy of a module with other attributes."""
    copy = types.ModuleType(module.__name__)
    vars(copy).update(vars(module), **attributes)
    return copy


def load(path: Path, scan: Callable[..., Any]) -> types.ModuleType:
    """The test file as a module that sees `scan` as `jax.lax.scan`; JAX itself and bptt_jax see JAX's."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(jax.lax, "scan", scan):  # for the lists of variants that the file makes
        spec.loader.exec_module(module)
    lax = changed(jax.lax, scan=scan)
    vars(module).update(jax=changed(jax, lax=lax), lax=lax)
    return module


def tests_in(suite: Any) -> Iterator[unittest.TestCase]:
    """The tests of a suite whose names contain "scan"."""
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from tests_in(test)
        elif "scan" in name_of(test).lower():
            yield test


def run(path: Path, scan: Callable[..., Any]) -> Failures:
    """The results of the file's tests with `scan` as `jax.lax.scan`."""
    suite = unittest.TestSuite(tests_in(unittest.TestLoader().loadTestsFromModule(load(path, scan))))
    result = Failures()
    suite.run(result)
    return result


def print_failures(title: str, lines: dict[str, str]) -> None:
    """A row of the table, and a line for each failure."""
    print(f"{title:<40}{len(lines):>5}")
    for name, line in sorted(lines.items()):
        print(f"    {name}: {line}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.jax_scan_tests",
        description=(__doc__ or "").replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("--budget")
    parser.add_argument("--lowering", choices=["nested", "sweep"])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, and returns the exit code."""
    options = parse(arguments)
    if options.path is None or not options.path.is_file():
        print(NEEDED)
        return 2
    ours = functools.partial(bptt_jax.scan, budget=options.budget, lowering=options.lowering)
    of_jax, of_ours = run(options.path, jax.lax.scan), run(options.path, ours)
    if not of_ours.testsRun:  # another file
        print(NEEDED)
        return 2
    only_ours = {name: line for name, line in of_ours.lines.items() if name not in of_jax.lines}
    expected = {name: line for name, line in only_ours.items() if EXPECTED.get(name) == line}
    unexpected = {name: line for name, line in only_ours.items() if name not in expected}
    print(f"{'run':<40}{of_ours.testsRun - len(of_ours.skipped):>5}")
    print_failures("jax.lax.scan fails", of_jax.lines)
    print_failures("bptt_jax.scan only fails", unexpected)
    print_failures("bptt_jax.scan only fails, as expected", expected)
    return 1 if unexpected else 0


if __name__ == "__main__":
    compile_quickly()
    sys.exit(main())
