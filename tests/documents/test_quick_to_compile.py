"""What makes tests compile quickly leaves the bytes of programs as they are."""

import os

import jax
import jax.numpy as jnp
import pytest

import bptt_jax
from tests.audit.kinds import KINDS
from tests.support.quick_to_compile import as_users_do


def measured():
    """What XLA reports for gradients with given plans, which need no check."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "allow")
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    plan = bptt_jax.Repeat(10, bptt_jax.Remat(bptt_jax.Steps(10)))
    return {
        f"{kind}, {lowering}": temporaries(KINDS[kind]().without_outputs(), plan, lowering)
        for kind, lowering in [("lstm", "sweep"), ("attention", "nested"), ("waves", "sweep")]
    }


def temporaries(problem, plan, lowering):
    def loss(params, init, xs):
        carry, _ = bptt_jax.scan(
            lambda carry, x: problem.step(params, carry, x), init, xs, plan=plan, lowering=lowering
        )
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(carry))

    compiled = jax.jit(jax.grad(loss)).lower(problem.params, problem.init, problem.xs(100)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_bytes_are_those_of_programs_compiled_as_users_do():
    assert "xla_backend_optimization_level" in os.environ["XLA_FLAGS"]
    assert as_users_do(__name__, "measured") == measured()
