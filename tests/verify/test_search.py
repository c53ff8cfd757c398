"""The search for the fastest plan that holds, on ladders that are made up, with compilers that report anything."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import pytest

from bptt_jax import Steps
from bptt_jax._verify.search import MOST_PROGRAMS, Candidate, Check, verify


@dataclasses.dataclass(frozen=True)
class Rungs:
    """Plans of which the n-th is predicted to take so many bytes, and the time falls with them."""

    predicted: tuple[int, ...]
    resorts: int = 1

    def candidate(self, n):
        return Candidate(Steps(n), None, self.predicted[n], float(len(self.predicted) - n))

    def within(self, bytes_):
        fitting = [n for n, size in enumerate(self.predicted) if size <= bytes_]
        return self.candidate(max(fitting)) if fitting else None

    def last_resorts(self):
        return [self.candidate(n) for n in range(min(self.resorts, len(self.predicted)))]


def search(ladder, asked, measured):
    """All checks, and the plan that is found; `measured` is of the bytes that are predicted."""
    verdict = verify(ladder, asked, lambda candidate: Check(candidate, measured(candidate.predicted_bytes)))
    return verdict.checks, verdict.best


FINE = Rungs(tuple(int(1000 * 1.01**n) for n in range(600)))  # up to 400 kB, by one per cent


@pytest.mark.parametrize("factor", [0.3, 0.6, 0.8, 0.95, 1.0, 1.1, 1.5, 3.0])
@pytest.mark.parametrize("spare", [0, 20_000])
def test_where_bytes_are_in_proportion_or_with_some_beside_nine_tenths_are_used(factor, spare):
    for asked in (50_000, 100_000, 117_000):
        checks, found = search(FINE, asked, lambda size: factor * size + spare)
        assert 0.9 * asked <= found.measured_bytes <= asked
        assert len(checks) <= (2 if spare == 0 else 3)


def drawn(sizes, random, noise):
    """A ladder, and a compiler that reports something else than is predicted, always the same for a plan."""
    known = {}

    def measured(size):
        return known.setdefault(size, size * math.exp(noise * random.uniform(-1, 1)))

    return Rungs(tuple(sorted(sizes)), random.randint(1, 3)), measured


given_ladders = hypothesis.given(
    st.lists(st.integers(1, 10**9), min_size=1, max_size=30, unique=True),
    st.integers(1, 2 * 10**9),
    st.randoms(use_true_random=False),
    st.floats(0, 3),
)


@given_ladders
def test_whatever_a_compiler_reports(sizes, asked, random, noise):
    """At most four programs, none twice; what is found holds; if nothing does, the smallest was tried."""
    ladder, measured = drawn(sizes, random, noise)
    checks, found = search(ladder, asked, measured)
    assert 1 <= len(checks) <= MOST_PROGRAMS
    assert len({check.candidate for check in checks}) == len(checks)
    assert found in checks
    if found.measured_bytes > asked:
        assert {*ladder.last_resorts()} <= {check.candidate for check in checks}
    else:
        assert found.candidate.predicted_time == min(
            check.candidate.predicted_time for check in checks if check.measured_bytes <= asked
        )


@given_ladders
def test_the_smallest_budget_that_a_refusal_names_is_accepted(sizes, asked, random, noise):
    ladder, measured = drawn(sizes, random, noise)
    _, found = search(ladder, asked, measured)
    if found.measured_bytes > asked:
        smallest = math.ceil(found.measured_bytes)
        assert search(ladder, smallest, measured)[1].measured_bytes <= smallest


def test_a_program_that_the_compiler_refuses_for_its_size_did_not_hold():
    checks, found = search(FINE, 100_000, lambda size: math.inf if size > 30_000 else size)
    assert math.isinf(checks[0].measured_bytes)
    assert found.measured_bytes <= 30_000


def test_what_everything_kept_takes_is_not_improved_on():
    checks, found = search(FINE, 10**9, float)
    assert len(checks) == 1
    assert found.candidate == FINE.candidate(599)


def test_where_nothing_is_reported_the_search_goes_up():
    """A TPU reports nothing for what fits on the chip."""
    checks, found = search(FINE, 300_000, lambda size: 0 if size < 100_000 else size)
    assert found.measured_bytes >= 0.9 * 300_000
    assert len(checks) <= MOST_PROGRAMS
