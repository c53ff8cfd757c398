"""The budget of a layer is that of the layer: batch-major, backwards, with lengths and resets."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import bptt_jax
from bptt_jax import Chain, Remat, Repeat, Steps
from tests.measure.test_bytes import temporaries
from tests.scan.test_gradients import pairwise
from tests.support import comparison, targets

pytestmark = pytest.mark.usefixtures("implicit_broadcasting")
LENGTH = 1000
# Of each cell the shape of inputs (batch, *features), and whether it is run as several layers.
CELLS = {
    "lstm": (lambda: [nn.OptimizedLSTMCell(256)], (16, 64)),
    "gru": (lambda: [nn.GRUCell(256)], (16, 64)),
    "layers": (lambda: [nn.LSTMCell(128), nn.SimpleCell(96), nn.GRUCell(128)], (16, 64)),
    "convlstm": (lambda: [nn.ConvLSTMCell(4, (3, 3))], (2, 12, 12, 3)),
}
FORMS = {
    "forwards": {},
    "reverse": {"reverse": True},
    "reverse in order": {"reverse": True, "keep_order": True},
    "lengths": {"seq_lengths": True},
    "lengths reverse": {"seq_lengths": True, "reverse": True},
    "lengths reverse in order": {"seq_lengths": True, "reverse": True, "keep_order": True},
    "resets": {"resets": True},
}
PLAN = Chain((Repeat(16, Remat(Repeat(3, Remat(Steps(20))))), Repeat(2, Remat(Steps(20)))))
NAMES = tuple(CELLS)
SHARES = (0.03, 0.05, 0.1)
WRT = {"weights": (0,), "all": (0, 1)}


def gradient_of(name, form, wrt, has_outputs, make, time_major=False, length=LENGTH):
    """The gradient of a loss on the last carry, or on outputs too, and the types of its arguments.

    Args:
      make: from a cell to the layer that runs it.
    """
    cells, (batch, *features) = CELLS[name]
    call = dict(FORMS[form])
    if call.get("seq_lengths"):
        call["seq_lengths"] = jnp.arange(batch) % length + 1
    if call.pop("resets", False):
        call["resets"] = jnp.zeros((length, batch) if time_major else (batch, length), bool).at[1, 1].set(True)

    def run(xs):
        carries = []
        for cell in cells():
            carry, xs = make(cell)(xs, return_carry=True, time_major=time_major, **call)
            carries.append(carry)
        return carries, xs

    def model(method, *args):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, xs):
                return run(xs)

        return getattr(Model(), method)(*args)

    def loss(variables, xs):
        carries, outputs = model("apply", variables, xs)
        of_carries = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(carries))
        return of_carries + jnp.sum(jnp.sin(outputs)) if has_outputs else of_carries

    xs = jax.ShapeDtypeStruct((length, batch, *features) if time_major else (batch, length, *features), jnp.float32)
    variables = jax.eval_shape(functools.partial(model, "init"), jax.random.key(0), xs)
    return jax.grad(loss, WRT[wrt]), (variables, xs)


def without_resets(form):
    """What Flax's layer has of a form."""
    return "forwards" if form == "resets" else form


@functools.cache
def bytes_of_flax(name, form, wrt, has_outputs):
    function, arguments = gradient_of(name, without_resets(form), wrt, has_outputs, nn.RNN)
    return temporaries(function, *arguments)


def bytes_of_sequences(name, has_outputs):
    """Of the outputs in the loss and of the sequences between layers, with their cotangents."""
    cells, (batch, *features) = CELLS[name]
    widths = [cell.features for cell in cells()]
    space = 1
    for size in features[:-1]:
        space *= size
    return 2 * 4 * LENGTH * batch * space * sum(widths if has_outputs else widths[:-1])


# Each pair of values of two columns; as a whole the table is 504 programs.
CASES = list(pairwise(NAMES, tuple(FORMS), SHARES, tuple(WRT), (False, True)))


@pytest.mark.one_in(31)
@pytest.mark.parametrize(("name", "form", "share", "wrt", "has_outputs"), CASES)
def test_a_batch_major_layer_is_within_its_budget(name, form, share, wrt, has_outputs):
    layers = len(CELLS[name][0]())
    budget = int(share * bytes_of_flax(name, form, wrt, has_outputs))
    make = functools.partial(bptt_jax.linen.RNN, budget=bptt_jax.linen.share_budget(budget, layers))
    function, arguments = gradient_of(name, form, wrt, has_outputs, make)
    allowed = budget + bytes_of_sequences(name, has_outputs)
    found = temporaries(function, *arguments)
    print(f"{found / 2**20:.2f} MiB, asked {budget / 2**20:.2f}, with sequences {allowed / 2**20:.2f}")
    assert found <= allowed


@pytest.mark.one_in(53)
@pytest.mark.parametrize(
    ("name", "form", "wrt", "has_outputs"), pairwise(NAMES, tuple(FORMS), tuple(WRT), (False, True))
)
def test_batch_major_takes_what_time_major_takes(name, form, wrt, has_outputs):
    """By one plan; which plan the other budget of two finds, is another matter."""
    make = functools.partial(bptt_jax.linen.RNN, plan=PLAN)
    batch_major, time_major = (
        temporaries(function, *arguments)
        for function, arguments in (
            gradient_of(name, form, wrt, has_outputs, make, time_major) for time_major in (False, True)
        )
    )
    print(f"{batch_major / time_major:.3f}")
    assert batch_major <= 1.02 * time_major


@pytest.mark.one_in(53)
@pytest.mark.parametrize(("name", "form", "has_outputs"), pairwise(NAMES, tuple(FORMS), (False, True)))
def test_nothing_of_the_length_is_transposed(name, form, has_outputs):
    """Neither xs nor ys, nor their cotangents."""
    length = 1009  # of which no other size is a multiple
    make = functools.partial(bptt_jax.linen.RNN, budget="10%")
    function, arguments = gradient_of(name, form, "all", has_outputs, make, length=length)
    assert not moved_in(function, arguments, length)


def test_flax_transposes_what_has_the_length():
    """So one sees that the test before can fail."""
    function, arguments = gradient_of("lstm", "forwards", "all", True, nn.RNN, length=1009)
    assert moved_in(function, arguments, 1009)


def moved_in(function, arguments, length):
    """The lines of XLA's text that transpose an array of a length, or copy it, as it writes most transposes.

    A copy of zeros is not meant, which two loops write their results into.
    """
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert f",{length}," in text
    return re.findall(rf".* = \w+\[(?:\d+,)*{length}(?:,\d+)*\]\S* (?:transpose|copy)\((?!%broadcast).*", text)


TOO_LOW = {(targets.h100, "convlstm"), (targets.v5e, "gru")}  # by 11 %, and with lengths by 28 %


@pytest.mark.parametrize("target", [targets.h100, targets.v5e], ids=lambda target: target.__name__)
@pytest.mark.parametrize(
    ("name", "form", "share", "wrt", "has_outputs"),
    CASES,
)
def test_on_a_target_that_is_not_here(target, name, form, share, wrt, has_outputs):
    device = targets.or_skip(target)
    sharding = jax.sharding.SingleDeviceSharding(device)

    def measured(make, form):
        function, arguments = gradient_of(name, form, wrt, has_outputs, make)
        typed = (jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf in jax.tree.leaves(arguments))
        return temporaries(function, *jax.tree.unflatten(jax.tree.structure(arguments), typed))

    with jax.enable_x64(False), targets.planning_for(device.platform, device):
        layers = len(CELLS[name][0]())
        asked = bptt_jax.linen.share_budget(int(share * measured(nn.RNN, without_resets(form))), layers)
        found, part = comparison.in_smallest_budget(
            lambda part: measured(functools.partial(bptt_jax.linen.RNN, budget=part), form), asked
        )
    budget = layers * part
    allowed = budget + bytes_of_sequences(name, has_outputs)
    print(f"{found / 2**20:.2f} MiB, asked {budget / 2**20:.2f}, with sequences {allowed / 2**20:.2f}")
    if found > allowed and (target, name) in TOO_LOW:
        pytest.xfail("what is predicted for the device is too low, for time-major inputs too")
    assert found <= allowed


def test_the_last_carry_takes_less_than_the_last_output():
    """The README's figures: of the last output alone, a layer holds all outputs and their cotangents."""
    layer, inputs = bptt_jax.linen.RNN(nn.GRUCell(64), budget="2MiB"), jax.ShapeDtypeStruct((16, 400, 64), jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), inputs)

    def of_carry(variables, inputs):
        return layer.apply(variables, inputs, return_carry=True)[0].sum()

    def of_output(variables, inputs):
        return layer.apply(variables, inputs)[:, -1].sum()

    carry, output = (
        jax.jit(jax.grad(loss)).lower(variables, inputs).compile().memory_analysis().temp_size_in_bytes / 2**20
        for loss in (of_carry, of_output)
    )
    print(f"last carry {carry:.2f} MiB, last output {output:.2f} MiB")
    assert carry <= 2
    assert carry + 1 < output < 4
