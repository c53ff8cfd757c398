"""The gradient of a Flax RNN on four devices, as ours and as Flax's own. A program: prints JSON for `test_devices`.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.support.four_devices explicit hidden

The budget is bytes of a device, but under automatic sharding of the global arrays, which is what a scan sees there.
"""

import json
import sys
import warnings
from typing import Any

import jax
from jax.sharding import AxisType

from bptt_jax.errors import UnverifiedWarning
from tests.support import comparison
from tests.support.collectives import Collective, collectives
from tests.support.devices import AXIS, LAYOUTS, make_arguments, make_cell, placed, plain, vjp, within

TOLERANCE = 1e-10
BUDGETS = {"automatic": 300_000, "explicit": 60_000, "shard_map": 60_000}


def compile_divided(layer: Any, mode: str, layout: Any, mesh: Any, arguments: Any) -> tuple[Any, Any]:
    """The compiled vjp of a layer, and its arguments where they belong."""
    run = vjp(layer)
    divided = placed(arguments, layout, mesh)
    if mode == "shard_map":
        specs = layout.arguments(arguments), layout.results(arguments)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs[0], out_specs=specs[1])
    if mode != "explicit":
        return jax.jit(run).lower(*divided).compile(), divided
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(*divided).compile(), divided


def described(found: list[Collective]) -> list[dict[str, Any]]:
    return [{"kind": one.kind, "loops": one.loops, "result_bytes": one.result_bytes} for one in found]


def main() -> None:
    mode, name = sys.argv[1:]
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("error", UnverifiedWarning)  # budgets are verified on all of them
    assert jax.device_count() == 4, "set XLA_FLAGS=--xla_force_host_platform_device_count=4"
    layout, is_gathering = LAYOUTS[name], (mode, name) == ("shard_map", "hidden")
    arguments = make_arguments(make_cell(is_gathering))
    whole = jax.device_get(jax.jit(vjp(plain(make_cell(is_gathering))))(*arguments))
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4,), (AXIS,), axis_types=(kind,))
    cell = make_cell(is_gathering, devices=4 if is_gathering else 1)
    layers = {"ours": within(cell, BUDGETS[mode]), "plain": plain(cell)}
    report: dict[str, Any] = {"budget": BUDGETS[mode]}
    for whose, layer in layers.items():
        compiled, divided = compile_divided(layer, mode, layout, mesh, arguments)
        comparison.assert_same(jax.device_get(compiled(*divided)), whole, TOLERANCE)
        report[whose] = {
            "temporaries": compiled.memory_analysis().temp_size_in_bytes,
            "collectives": described(collectives(compiled.as_text())),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
