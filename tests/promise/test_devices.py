"""A Flax RNN on four devices of one process, and on four of two processes that these tests start and end.

The programs that run (`four_devices`, `two_processes`) compare gradients with those of one device to 1e-10.
"""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from tests.support.collectives import Collective, collectives, in_loops, moved_bytes
from tests.support.devices import BATCH, LENGTH, WIDTH

# By hand: 3 times a gathered f64[2,8] of 128 bytes; an all-reduce of 8 + 4 bytes in the loop within; of s32[] after.
PROGRAM = """
HloModule jit_f, is_scheduled=true

%add (a: f64[], b: f64[]) -> f64[] {
  %a = f64[] parameter(0)
  %b = f64[] parameter(1)
  ROOT %sum = f64[] add(%a, %b)
}

%inner (p: (s32[], f64[2])) -> (s32[], f64[2]) {
  %p = (s32[], f64[2]{0}) parameter(0)
  %both = (f64[1]{0:T(128)}, f32[1]{0}) all-reduce(%x, %y), replica_groups={}, to_apply=%add
  ROOT %t = (s32[], f64[2]{0}) tuple(%i, %p)
}

%outer (q: (s32[], f64[2])) -> (s32[], f64[2]) {
  %q = (s32[], f64[2]{0}) parameter(0)
  %gather = f64[2,8]{1,0} all-gather(%q), dimensions={1}
  %within = (s32[], f64[2]{0}) while(%q), condition=%c, body=%inner
  ROOT %u = (s32[], f64[2]{0}) tuple(%i, %gather)
}

%c (r: (s32[], f64[2])) -> pred[] {
  %r = (s32[], f64[2]{0}) parameter(0)
  ROOT %less = pred[] compare(%r, %r), direction=LT
}

ENTRY %main (z: f64[2]) -> s32[] {
  %z = f64[2]{0} parameter(0)
  %loop = (s32[], f64[2]{0}) while(%z), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %last = s32[] all-reduce(%loop), to_apply=%add
}
"""


def test_collectives_counted_by_hand():
    found = collectives(PROGRAM)
    assert found == [
        Collective("all-gather", (3,), 128),
        Collective("all-reduce", (3, None), 12),
        Collective("all-reduce", (), 4),
    ]
    assert in_loops(found) == found[:2]
    assert moved_bytes(found, "all-gather") == 3 * 128


def run_program(*arguments, timeout=300):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def found_in(report):
    return [Collective(one["kind"], tuple(one["loops"]), one["result_bytes"]) for one in report["collectives"]]


def of_arrays(found):
    """Without the number or two by which a sweep's backward tells that its cotangents are there."""
    return [one for one in found if one.loops or one.result_bytes > 16]


@pytest.mark.one_in(13)
@pytest.mark.parametrize("layout", ["batch", "hidden"])
@pytest.mark.parametrize("mode", ["automatic", "explicit", "shard_map"])
def test_on_four_devices(mode, layout):
    report = json.loads(run_program("tests.support.four_devices", mode, layout))
    ours, theirs = of_arrays(found_in(report["ours"])), found_in(report["plain"])
    print(f"{mode}, {layout}: budget {report['budget']}, measured {report['ours']['temporaries']}, plain:")
    print(f"{report['plain']['temporaries']}; collectives of ours {ours}, of flax.linen.RNN {theirs}")
    assert report["ours"]["temporaries"] <= report["budget"] < report["plain"]["temporaries"]
    assert in_loops(theirs)
    assert {one.kind for one in ours} <= {one.kind for one in theirs}
    # Each step is run forward once more, for which its hidden state is gathered (only where Flax gathers anything, or
    # its kind would be new). A gathered checkpoint, or a gathered stack of residuals, would be more.
    assert moved_bytes(ours, "all-gather") <= moved_bytes(theirs, "all-gather") + LENGTH * BATCH * WIDTH * 8
    for kind in ("all-reduce", "reduce-scatter"):
        assert moved_bytes(ours, kind) <= moved_bytes(theirs, kind)
    if layout == "batch" and mode != "automatic":
        assert not in_loops(ours)  # the gradients of the weights are added up among devices once


@pytest.mark.slow
def test_sequences_of_several_lengths_stay_on_their_devices():
    """Read backwards, the batch divided: what is summed over devices are the gradients of the weights."""
    report = json.loads(run_program("tests.support.ragged_devices"))
    print(report)
    assert len(report) == 4
    assert {kind for found in report.values() for kind, _ in found} <= {"all-reduce"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_on_two_processes():
    start, coordinator = time.monotonic(), f"127.0.0.1:{free_port()}"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.support.two_processes"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(i), coordinator], env=environment, **pipes) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()  # where one failed, the other may wait for it
            process.wait()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    first, second = (json.loads(printed.splitlines()[-1]) for printed, _ in outputs)
    print(f"{time.monotonic() - start:.0f} s: {first}")
    for one, other in zip(first, second, strict=True):
        seen, seen_by_other = one.pop("seen"), other.pop("seen")
        assert [int(1.5 * size) for size in seen] == seen_by_other
        assert seen
    assert first == second  # the same program, by what the second saw
    assert [report["case"] for report in first] == [["explicit", "batch"], ["shard_map", "hidden"]]
    for report in first:
        assert report["temporaries"] <= report["budget"]
