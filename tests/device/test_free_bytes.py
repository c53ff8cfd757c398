"""`budget="auto"`: what a device, a machine or a container has free."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax
from bptt_jax import make_plan
from bptt_jax._device import free_bytes as _free_bytes


def step(carry, x):
    return jnp.tanh(carry * x), carry


ARGUMENTS = (jnp.ones((8, 16), jnp.float32), jnp.ones((300, 8, 16), jnp.float32))


class Device:
    platform = "gpu"

    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_auto_is_what_the_device_has_free_without_a_reserve():
    stats = {"bytes_limit": 80 << 30, "bytes_in_use": 16 << 30}
    assert _free_bytes.free_bytes(Device(stats)) == 48 << 30
    for silent in ({}, None):
        with pytest.raises(ValueError, match=r'budget="auto" needs to know the free memory of .* pass bytes, or "5%"'):
            _free_bytes.free_bytes(Device(silent))


def test_auto_takes_the_least_of_all_processes(monkeypatch):
    from jax.experimental import multihost_utils

    of_other = np.frombuffer(np.float64(4 << 30).tobytes(), np.uint8)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.stack([own, of_other]))
    assert _free_bytes.free_bytes(Device({"bytes_limit": 80 << 30})) == 3 << 30


def test_auto_on_cpu_heeds_the_container(monkeypatch, tmp_path):
    system = _free_bytes.free_bytes()
    assert 0 < system < 1 << 50
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 29}\n")
    available = _free_bytes._available_to_container(tmp_path)
    assert available == 1 << 29
    (tmp_path / "memory.max").write_text("max\n")
    assert _free_bytes._available_to_container(tmp_path) is None
    monkeypatch.setattr(_free_bytes, "_available_to_container", lambda: 1 << 29)
    assert _free_bytes.free_bytes() == 3 << 27


def test_auto_as_a_budget(monkeypatch):
    monkeypatch.setattr(_free_bytes, "_available_to_cpu", lambda: 1 << 20)
    report = bptt_jax.explain(step, *ARGUMENTS, budget="auto")
    assert report.budget_bytes == 3 << 18
    assert report.measured_bytes <= report.budget_bytes
    with pytest.raises(ValueError, match=re.escape('budget="auto" is for what knows a device')):
        make_plan(report.profile, 300, "auto")
