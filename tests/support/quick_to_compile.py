"""XLA without what it does for speed: most of a test is spent in LLVM. No sum changes by it.

Bytes do in one respect: arrays with axes of length 1 are copied by newer emitters of fusions only, which users have. So
what is about these, and the audit, compile with them.
"""

import json
import os
import subprocess
import sys
from typing import Any

import jax

_OF_LLVM = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
# Later versions have no other emitters, and end a process for a flag unknown to them.
_EMITTERS = ["--xla_cpu_use_fusion_emitters=false"] if jax.__version_info__ < (0, 11, 0) else []


def compile_quickly(*, other_emitters: bool = True) -> None:
    """From now on, in this process and those it starts; before JAX compiles anything."""
    flags = [*_OF_LLVM, *(_EMITTERS if other_emitters else [])]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])


def as_users_do(module: str, function: str) -> Any:
    """What a function of a module returns, as JSON, in a process that compiles with XLA's own settings."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    program = f"import json; from {module} import {function}; print(json.dumps({function}()))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout.splitlines()[-1])
