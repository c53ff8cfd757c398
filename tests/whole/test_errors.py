"""Errors of `largest_budget`: what was asked, what the program takes, and what would work."""

import pickle
import re

import jax
import jax.numpy as jnp
import pytest

from bptt_jax import largest_budget, scan
from bptt_jax.errors import BudgetError, FitError

SHAPES = jax.ShapeDtypeStruct((64,), jnp.float32), jax.ShapeDtypeStruct((1000, 64), jnp.float32)


def gradient(budget, *, divided=1, of_sizes=1):
    def loss(w, xs):
        for _ in range(of_sizes):
            carry, xs = scan(
                lambda c, x: (jnp.tanh(w * c + x),) * 2, jnp.zeros(64, jnp.float32), xs, budget=budget // divided
            )
        return carry.sum()

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize(
    ("within", "kind", "text"),
    [
        (
            "90%",
            ValueError,
            "within='90%' is a share, but of no number: the limit of a whole program is that of a device",
        ),
        ("14gib", ValueError, "within='14gib' is not a limit; .* Did you mean '14GiB'?"),
        ("14", ValueError, "within='14' is not a limit; .* Did you mean 14, or '14B'?"),
        ("1.5", ValueError, "Did you mean|did you mean '1.5GiB'?"),
        ("Auto", ValueError, "Did you mean 'auto'?"),
        (
            "plenty",
            ValueError,
            'use bytes as an int, a string such as "14GiB" or "1.5GB", or "auto" for what the device has.',
        ),
        (0, ValueError, "within=0 is 0 bytes, but a limit must be positive"),
        ("0GiB", ValueError, "within='0GiB' is 0 bytes, but a limit must be positive"),
        (None, TypeError, "within=None of type NoneType is not a limit"),
        (True, TypeError, "within=True of type bool is not a limit"),
        (14e9, TypeError, "within=14000000000.0 of type float is not a limit; .* Did you mean 14000000000?"),
        (0.9, TypeError, "within=0.9 of type float is not a limit"),
    ],
)
def test_malformed_limits(within, kind, text):
    with pytest.raises(kind, match=text.replace("?", r"\?").replace("(", r"\(")):
        largest_budget(gradient, *SHAPES, within=within)


def test_make_is_a_function_of_a_budget_that_returns_a_jitted_one():
    with pytest.raises(TypeError, match=r"make must be a function from a budget to a jitted function, got 3\. Did you"):
        largest_budget(3, *SHAPES, within="1MiB")
    with pytest.raises(
        TypeError, match=r"make\(\d+\) returned None of type NoneType, which has no method `lower`: retu"
    ):
        largest_budget(lambda budget: None, *SHAPES, within="1MiB")
    with pytest.raises(TypeError, match=r"of type function, which has no method `lower`.*jax\.jit\(step"):
        largest_budget(lambda budget: lambda w, xs: w, *SHAPES, within="1MiB")
    with pytest.raises(TypeError, match="target must be a device"):
        largest_budget(gradient, *SHAPES, within="1MiB", target="gpu")


def test_the_users_own_errors_come_through():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'xs'"):
        largest_budget(gradient, SHAPES[0], within="1MiB")

    def broken(budget):
        raise LookupError("of my own")

    with pytest.raises(LookupError, match="of my own"):
        largest_budget(broken, *SHAPES, within="1MiB")


@pytest.mark.parametrize("layers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_too_small_a_limit_is_answered_with_one_that_works(layers):
    make = lambda budget: gradient(budget, divided=layers, of_sizes=layers)  # noqa: E731
    with pytest.raises(FitError) as info:
        largest_budget(make, *SHAPES, within="257KiB")
    error = info.value
    assert error.within_bytes == 257 * 1024
    assert str(error).startswith(
        "no budget makes the program fit within='257KiB', which is 263,168 bytes: "
        f"with budget={error.budget_bytes}, the smallest that its scans take, "
        f"it takes {error.smallest_bytes:,} bytes. These are, the largest share first, "
    )
    assert "256,256 bytes for arguments" in str(error)
    assert f"within={error.smallest_bytes} would do." in str(error)
    assert sum(error.shares.values()) == error.smallest_bytes
    with pytest.raises(BudgetError):  # it is the smallest, but for a rounded hundredth
        make(error.budget_bytes * 99 // 100).lower(*SHAPES)
    budget, report = largest_budget(make, *SHAPES, within=error.smallest_bytes)
    assert report.chosen.total_bytes == error.smallest_bytes
    assert budget == pytest.approx(error.budget_bytes, rel=1e-3)  # learned from another refusal, and rounded up
    assert "no program, because a scan's smallest plan needs" in str(report)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.shares, copy.smallest_bytes) == (str(error), error.shares, error.smallest_bytes)


def test_a_budget_that_is_not_handed_on_is_suspected():
    with pytest.raises(FitError, match=r"as many with each budget: does make\(budget\) hand its budget on") as info:
        largest_budget(lambda budget: gradient(1 << 17), *SHAPES, within="300KiB")
    assert info.value.smallest_bytes > 300 * 1024
    with pytest.raises(BudgetError):  # nothing is learned of a budget beside the one given
        largest_budget(lambda budget: gradient(1 << 9), *SHAPES, within="300KiB")


def test_a_program_without_a_scan_says_so():
    with pytest.raises(FitError, match="It differentiates no scan of bptt_jax, so a budget has nothing to bound"):
        largest_budget(lambda budget: jax.jit(lambda w, xs: (w, xs)), *SHAPES, within="100KiB")


def test_hints_are_of_the_largest_parts():
    with pytest.raises(FitError, match=re.escape("No argument is donated: with donate_argnums")):
        largest_budget(lambda budget: jax.jit(lambda w, xs: (w, 2 * xs)), *SHAPES, within="100KiB")


def test_a_device_that_does_not_tell_its_memory():
    class Silent:
        platform = "gpu"
        memory_stats = staticmethod(dict)

    with pytest.raises(ValueError, match=r'within="auto" needs to know the memory of .*; pass bytes, or "14GiB"'):
        largest_budget(gradient, *SHAPES, within="auto", target=Silent())


def test_a_refusal_of_the_compiler_is_told():
    assert "the compiler refuses it for its size" in str(FitError("1GiB", 1 << 30, 4096, None))
