"""One of two processes that train together: the gradient of a Flax RNN, divided among the devices of both.

    python -m tests.support.two_processes 0 127.0.0.1:9876 & python -m tests.support.two_processes 1 127.0.0.1:9876

Each has two of the four devices, compares its parts of the gradient with those of the whole on one device, and prints
JSON for `test_devices`. The compilers differ, as on GPUs that choose other kernels: that of the second process seems to
take half as much again, and longer.
"""

import hashlib
import json
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from bptt_jax._verify import check as _check
from tests.support.devices import AXIS, LAYOUTS, make_arguments, make_cell, plain, vjp, within
from tests.support.four_devices import BUDGETS, TOLERANCE, compile_divided

CASES = (("explicit", "batch"), ("shard_map", "hidden"))
SEEN: list[int] = []  # bytes of the checks by this process's own compiler


def assert_parts_equal(divided: Any, whole: Any) -> None:
    """Compares what this process holds of an array with the same part of the whole."""
    parts = divided.addressable_shards
    assert len(parts) == 2, parts
    for part in parts:
        np.testing.assert_allclose(part.data, whole[part.index], rtol=TOLERANCE, atol=TOLERANCE)


def check(mode: str, name: str) -> dict[str, Any]:
    SEEN.clear()
    is_gathering = (mode, name) == ("shard_map", "hidden")
    arguments = make_arguments(make_cell(is_gathering))
    whole = jax.device_get(jax.jit(vjp(plain(make_cell(is_gathering))))(*arguments))
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4,), (AXIS,), axis_types=(kind,))
    layer = within(make_cell(is_gathering, devices=4 if is_gathering else 1), BUDGETS[mode])
    compiled, divided = compile_divided(layer, mode, LAYOUTS[name], mesh, arguments)
    jax.tree.map(assert_parts_equal, compiled(*divided), whole)
    return {
        "case": [mode, name],
        "budget": BUDGETS[mode],
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "seen": list(SEEN),
        # All processes must compile the same program, or they wait for each other for ever.
        "program": hashlib.sha256(compiled.as_text().encode()).hexdigest(),
    }


def report_as(process: int) -> None:
    """Makes this process's compiler one of its own."""
    measured = _check.temporaries_of_gradient

    def reported(*args: Any) -> tuple[int, int]:
        time.sleep(0.5 * process)
        on_device, on_host = measured(*args)
        SEEN.append(int(on_device * (1 + 0.5 * process)))
        return SEEN[-1], on_host

    _check.temporaries_of_gradient = reported


def main() -> None:
    process, coordinator = sys.argv[1:]
    report_as(int(process))
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(coordinator, num_processes=2, process_id=int(process), initialization_timeout=60)
    try:
        assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
        print(json.dumps([check(*case) for case in CASES]))
    finally:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
