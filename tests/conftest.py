"""Strict modes for every test: double precision, no silent promotion of dtypes or ranks."""

from pathlib import Path

import jax
import pytest

from tests.support.quick_to_compile import compile_quickly

_STRICT = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}


def pytest_configure(config):
    if not any("tests/bench" in Path(argument).as_posix() for argument in config.args):  # where time counts
        compile_quickly()


@pytest.fixture(autouse=True)
def strict_jax():
    before = {name: getattr(jax.config, name) for name in _STRICT}
    for name, value in _STRICT.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def implicit_broadcasting(strict_jax):
    """What steps of users do, and Flax; `comparison` looks at the types of results strictly all the same."""
    jax.config.update("jax_numpy_rank_promotion", "allow")
    jax.config.update("jax_numpy_dtype_promotion", "standard")
