"""Strict modes for every test, and a default run of a few minutes: of many similar cases it takes few."""

import collections
import zlib
from pathlib import Path

import jax
import pytest

from bptt_jax._caches import forget_everything
from tests.support.quick_to_compile import compile_quickly

_STRICT = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}


def pytest_addoption(parser):
    parser.addoption(
        "--cases", type=int, default=1, metavar="N", help="some N times as many cases of tests with one_in"
    )
    parser.addoption("--turn", type=int, metavar="N", help="others of them too, drawn by this number")


def pytest_configure(config):
    if not any("tests/bench" in Path(argument).as_posix() for argument in config.args):  # where time counts
        compile_quickly()


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out tests that are marked slow
def pytest_collection_modifyitems(config, items):
    """Of a test marked `one_in(n)` one case of n stays, the first; the others are slow and further.

    With a turn, drawn cases stay beside those of the default run.
    """
    if any("::" in argument for argument in config.args):  # cases that are named run
        return
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("one_in") is not None:
            cases[item.nodeid.partition("[")[0]].append(item)
    times, turn = config.getoption("--cases"), config.getoption("--turn")
    for test, of_test in cases.items():
        one_in = of_test[0].get_closest_marker("one_in").args[0]
        n = -(-one_in // times) | 1  # odd, so of cases of two kinds in turn both are taken
        stay = set(range(0, len(of_test), n if turn is None else one_in | 1))
        if turn is not None:
            starts = range(0, len(of_test), n)
            stay |= {i + zlib.crc32(f"{test} {i} {turn}".encode()) % min(n, len(of_test) - i) for i in starts}
        for item in (item for i, item in enumerate(of_test) if i not in stay):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.further)


@pytest.fixture(autouse=True)
def strict_jax():
    """Double precision, no silent promotion of dtypes or ranks."""
    before = {name: getattr(jax.config, name) for name in _STRICT}
    for name, value in _STRICT.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def fresh_caches(request):
    """Empty caches around tests that patch the package, because equal steps share their plans and programs."""
    patches = "monkeypatch" in request.fixturenames
    if patches:
        forget_everything()
    yield
    if patches:
        forget_everything()


@pytest.fixture
def implicit_broadcasting(strict_jax):
    """What steps of users do, and Flax; `comparison` looks at the types of results strictly all the same."""
    jax.config.update("jax_numpy_rank_promotion", "allow")
    jax.config.update("jax_numpy_dtype_promotion", "standard")
