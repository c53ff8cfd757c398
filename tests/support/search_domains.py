"""Domains of the bidirectional search for tests, ARC symmetry with hand-made grids."""

import functools
import random

import numpy as np
import pytest
from hypothesis import strategies as st

from examples.bidirectional_search import abstraction, baselines
from examples.bidirectional_search.domains import arc, double_and_add, game24, grids
from examples.bidirectional_search.programs import parse

seeds = st.integers(0, 2**32 - 1)
PRIMITIVES = {
    primitive.name: primitive for primitive in (*grids.search_primitives(), *grids.abstraction_primitives()[2:])
}


def random_grid(rng, height, width, colours=10):
    return grids.grid(rng.integers(0, colours, (height, width)))


def learned(text, arity=1):
    return abstraction.learned_primitive("learned", arity, parse(text, PRIMITIVES, variable="#"))


@functools.cache
def small_arc():
    """ARC symmetry on a pool of hand-made grids, with a mirror as the task to test on."""
    rng = np.random.default_rng(0)
    pool = [tuple(random_grid(rng, *rng.integers(1, 4, 2)) for _ in range(2)) for _ in range(10)]
    tasks = {"tasks": [arc.arc_task("mirror", [([[1, 2]], [[1, 2, 2, 1]])], [([[3, 0]], [[3, 0, 0, 3]])])]}
    return arc.ArcSymmetry(pool, tasks, largest=9, learned=(learned("(vstack #0 (flip_v #0))"),))


DOMAINS = {
    "double-and-add": functools.cache(double_and_add.DoubleAndAdd),
    "24-game": functools.cache(game24.Game24),
    "arc-symmetry": small_arc,
}
domains = pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)


def random_search(domain, seed, bidirectional=True):
    task = domain.random_task(np.random.default_rng(seed))
    return baselines.ConstantPolicy(domain, bidirectional).play(task, random.Random(seed))
