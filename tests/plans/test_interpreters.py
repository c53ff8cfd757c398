"""Notation and back, pictures, the executor itself, and the purity of the layer that knows no JAX."""

import sys
import xml.etree.ElementTree

import hypothesis
import hypothesis.strategies as st
import pytest

from bptt_jax import Chain, Remat, Repeat, StepProfile, Steps, cost, make_plan
from bptt_jax._cost.time import predicted_time
from bptt_jax.plans import Advance, Backward, Free, Record, Restore, Save, length, notation, parse, plot, simulate, svg
from bptt_jax.plans._profile import StepTimes
from tests.support.executor import Items, ScheduleError, execute

PLANS = st.recursive(
    st.builds(Steps, st.integers(0, 12)),
    lambda inner: st.one_of(
        st.builds(Repeat, st.integers(1, 4), inner),
        st.builds(Chain, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(Remat, inner),
    ),
    max_leaves=6,
)


@hypothesis.given(PLANS)
def test_notation_parses_back(plan):
    assert parse(notation(plan)) == plan


# Outermost loops, on the device or on the host, one after another.
TWO_MEMORIES = st.lists(
    st.builds(Repeat, st.integers(1, 4), PLANS, kept=st.sampled_from(("device", "host"))), min_size=1, max_size=3
).map(lambda parts: Chain(tuple(parts)))


@hypothesis.given(st.one_of(PLANS, TWO_MEMORIES))
def test_any_plan_can_be_executed_and_costs_what_cost_says(plan):
    ran = execute(simulate(plan), length(plan), Items(carry=3, residual=5))
    found = cost(plan, StepProfile(carry_bytes=3, residual_bytes=5))
    assert ran.forward_steps == found.forward_steps
    assert ran.peak_units <= found.peak_bytes
    assert ran.host_units <= found.host_bytes


@hypothesis.given(TWO_MEMORIES)
def test_plans_of_two_memories_parse_back_and_are_drawn(plan):
    assert parse(notation(plan)) == plan
    hypothesis.assume(length(plan) > 0)
    assert ("residuals on the host" in svg(plan)) == ("@" in notation(plan))


def shared_with_itself(doublings: int):
    plan = Steps(1)
    for _ in range(doublings):
        plan = Chain((plan, plan))
    return plan


def test_a_plan_of_a_quadrillion_leaves_is_written_read_compared_and_costed():
    plan = shared_with_itself(50)
    line = notation(plan)
    assert len(line) < 2000
    assert parse(line) == plan != shared_with_itself(49)
    assert cost(plan, StepProfile(1, 1)).forward_steps == length(plan) == 2**50
    assert predicted_time(plan, StepTimes()) == 3 * 2**50


def test_a_plan_deeper_than_pythons_stack_is_written_read_and_compared():
    plan = Steps(1)
    for _ in range(3 * sys.getrecursionlimit()):
        plan = Repeat(1, Remat(plan))
    assert parse(notation(plan)) == plan


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "character 0: expected a part"),
        ("3*", "character 2: expected a part"),
        ("(3 + ", "expected a part"),
        ("(4*[3] +", "character 8: expected a part"),
        ("(3", r"character 2: expected \+ or \)"),
        ("[3", r"character 2: expected \]"),
        ("x1=3", "character 4: expected ; and a part"),
        ("x1=3;", "character 5: expected a part"),
        ("(2 + 0*3)", "character 4: expected a count of at least 1"),
        ("(3 4)", r"character 2: expected \+, ;, \) or \]"),
        ("[3)", "character 2: expected a bracket"),
        ("3]", "character 1: expected a bracket"),
        ("()", "character 1: expected a part"),
        ("x1", "character 0: expected a definition of x1"),
        ("x1=3; x1 x1", "expected"),
        ("a", "character 0: expected a number"),
    ],
)
def test_malformed_lines_are_refused_with_the_place(line, expected):
    with pytest.raises(ValueError, match=expected):
        parse(line)


def test_what_is_no_line_is_refused():
    with pytest.raises(TypeError, match=r'parse takes a line such as "\(40\*\[25\] \+ 9\)", got 5 of type int'):
        parse(5)


def test_predicted_times():
    plan = parse("(2*[3] + 4)")
    assert predicted_time(plan, StepTimes()) == 36
    assert predicted_time(plan, StepTimes(forward=2, recording=3, backward=5, block=100)) == 10 * 8 + 6 * 2 + 5 * 100
    assert StepTimes(block=7).of_everything_kept(10) == predicted_time(Steps(10), StepTimes(block=7)) == 37
    with pytest.raises(ValueError, match=r"StepTimes.backward must be finite and not negative, got -1"):
        StepTimes(backward=-1)
    with pytest.raises(TypeError, match=r"StepProfile.times must be StepTimes"):
        StepProfile(1, 1, times=3)


GOOD = [Save(0), Advance(0, 1), Record(1, 2), Backward(1, 2), Restore(0), Record(0, 1), Backward(0, 1), Free(0)]


def test_the_executor_accepts_a_schedule():
    assert execute(GOOD, 2, Items(1, 10)).peak_units == 11
    assert execute(GOOD, 2, Items(1, 10, first_is_free=True), budget=10).forward_steps == 3


@pytest.mark.parametrize("left_out", range(len(GOOD)))
def test_the_executor_misses_every_event_that_is_left_out(left_out):
    with pytest.raises(ScheduleError):
        execute(GOOD[:left_out] + GOOD[left_out + 1 :], 2, Items(1, 10))


@pytest.mark.parametrize("at", range(len(GOOD) - 2))  # the last two may be swapped
def test_the_executor_notices_neighbours_in_the_wrong_order(at):
    with pytest.raises(ScheduleError):
        execute([*GOOD[:at], GOOD[at + 1], GOOD[at], *GOOD[at + 2 :]], 2, Items(1, 10))


def test_the_executor_holds_the_budget():
    with pytest.raises(ScheduleError, match="11 units are held, 10 are allowed"):
        execute(GOOD, 2, Items(1, 10), budget=10)


def test_an_svg_picture_shows_every_run_and_what_is_kept():
    plan = make_plan(StepProfile(1, 6), 32, 32)
    picture = xml.etree.ElementTree.fromstring(svg(plan))
    of_kind = [element.tag.split("}")[1] for element in picture.iter()]
    events = list(simulate(plan))
    assert of_kind.count("line") == sum(isinstance(e, Advance | Record | Backward | Free) for e in events)
    assert of_kind.count("polygon") == sum(isinstance(e, Record) for e in events)
    assert notation(plan) in svg(plan)


def test_a_matplotlib_picture_is_saved(tmp_path):
    pytest.importorskip("matplotlib")
    axes = plot(make_plan(StepProfile(1, 3), 32, 11), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert {"first evaluation", "recomputation", "recording", "backward", "kept carry", "kept residuals"} == labels


def test_without_matplotlib_the_way_to_get_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = r"bptt_jax.plans.plot needs matplotlib; install it with: python -m pip install 'bptt_jax\[cli\]'"
    with pytest.raises(ImportError, match=message):
        plot(Steps(3))
    assert svg(Steps(3)).startswith("<svg")


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ValueError, match="without steps"):
        svg(Steps(0))
    with pytest.raises(ValueError, match="more than 20000 events; draw a shorter one"):
        svg(Repeat(10_000, Remat(Steps(1))))
