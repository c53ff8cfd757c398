"""Strict modes for every test: double precision, no silent promotion of dtypes or ranks."""

import os

import jax
import pytest

_STRICT = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}


def pytest_configure(config):
    """Most of a test takes LLVM, whose optimisations change neither bytes nor sums; where time counts they stay on."""
    if not any("bench" in argument for argument in config.args):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"


@pytest.fixture(autouse=True)
def strict_jax():
    before = {name: getattr(jax.config, name) for name in _STRICT}
    for name, value in _STRICT.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
