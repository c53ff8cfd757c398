"""XLA without what it does for speed, which changes neither bytes nor sums: most of a test is spent in LLVM."""

import os

import jax

_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
# Later versions have no other emitters, and end a process for a flag unknown to them.
if jax.__version_info__ < (0, 11, 0):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def compile_quickly() -> None:
    """From now on, in this process and those it starts; before JAX compiles anything."""
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
