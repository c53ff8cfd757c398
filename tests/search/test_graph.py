"""The graph of the bidirectional search keeps what is true: inverses, grounding, masks, programs that run again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.bidirectional_search import drawing
from examples.bidirectional_search.domain import WASTED, Action, Node, Operation, Task
from examples.bidirectional_search.domains import arc, double_and_add, game24, grids
from examples.bidirectional_search.graph import Graph, Search, apply_to_all
from examples.bidirectional_search.programs import parse, run
from tests.support.search_domains import DOMAINS, domains, random_grid, random_search, seeds, small_arc

NUMBERS, GRIDS = st.integers(0, 100), st.builds(
    lambda seed, height, width: random_grid(np.random.default_rng(seed), height, width, 2),
    seeds, st.integers(1, 4), st.integers(1, 4),
)  # fmt: skip
BACKWARD = [
    *((Operation(primitive, 0), st.integers(1, 100)) for primitive in double_and_add.primitives(8)),
    *((operation, NUMBERS) for operation in game24.Game24.operations if operation.missing is not None),
    *((operation, GRIDS) for operation in small_arc().operations if operation.missing is not None),
]
inverses = pytest.mark.parametrize(("operation", "values"), BACKWARD, ids=[operation.name for operation, _ in BACKWARD])


@inverses
@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_an_inverse_adds_to_the_graph_makes_its_node_when_run_forward(operation, values, data):
    target, *given_values = data.draw(st.lists(values, min_size=operation.primitive.arity, max_size=3, unique=True))
    graph = Graph([(value,) for value in given_values], (target,))
    found = graph.apply(operation, [graph.target, *range(operation.primitive.arity - 1)])
    if found is not None:
        (edge,) = graph.edges[graph.target]
        assert edge.arguments[operation.missing] == found
        assert apply_to_all(edge.primitive.apply, [graph.values[node] for node in edge.arguments]) == (target,)


@inverses
@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_inverse_finds_an_argument_that_makes_what_the_forward_operation_made(operation, values, data):
    primitive, missing = operation.primitive, operation.missing
    arguments = data.draw(st.lists(values, min_size=primitive.arity, max_size=primitive.arity))
    result = primitive.apply(*arguments)
    if result is None:
        return
    others = [argument for at, argument in enumerate(arguments) if at != missing]
    found = primitive.inverse(missing)(result, *others)
    if found is None:  # where 0 is made by 0, any other factor would do
        assert primitive.name in "*/"
        assert 0 in [result, *others]
    else:
        assert found == arguments[missing]


def test_an_inverse_that_does_not_verify_wastes_its_step():
    domain = DOMAINS["double-and-add"]()
    search = Search(domain, domain.task(7))
    step = search.step(Action(double_and_add.HALVE, (1,)))
    assert not step.changed
    assert step.node is None
    assert step.tokens[-1] == WASTED
    assert search.steps == 1
    assert [node.value for node in search.nodes] == [(2,), (7,)]


def test_an_inverse_must_hold_on_every_example():
    stack = next(primitive for primitive in grids.search_primitives() if primitive.name == "vstack")
    above, below = grids.grid([[1]]), grids.grid([[2]])
    graph = Graph([(above, above)], (above + below, below + below))
    assert graph.apply(Operation(stack, 1), (1, 0)) is None
    graph = Graph([(above, above)], (above + below, above + above))
    assert graph.values[graph.apply(Operation(stack, 1), (1, 0))] == (below, above)


# The graph


@domains
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=seeds, bidirectional=st.booleans())
def test_nodes_are_grounded_if_edges_lead_to_them_from_the_inputs(domain, seed, bidirectional):
    search = random_search(domain(), seed, bidirectional)
    graph = search.graph
    reached, before = set(range(len(search.task.inputs))), -1
    while len(reached) > before:
        before = len(reached)
        for node, edges in enumerate(graph.edges):
            if any(reached.issuperset(edge.arguments) for edge in edges):
                reached.add(node)
    assert reached == {node for node in range(len(graph.values)) if graph.grounded(node)}
    assert graph.solved == (graph.target in reached)
    if not graph.solved:
        assert not any(
            reached.issuperset(edge.arguments)
            for node in set(range(len(graph.values))) - reached
            for edge in graph.edges[node]
        )


@domains
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=seeds)
def test_edges_are_true_and_values_are_different(domain, seed):
    graph = random_search(domain(), seed).graph
    for value, edges in zip(graph.values, graph.edges, strict=True):
        for edge in edges:
            assert apply_to_all(edge.primitive.apply, [graph.values[node] for node in edge.arguments]) == value
    if domain().keeps_nodes:
        assert len(set(graph.values)) == len(graph.values)


@domains
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=seeds, bidirectional=st.booleans())
def test_a_program_read_out_runs_to_the_target_and_is_read_back(domain, seed, bidirectional):
    domain = domain()
    task, actions = domain.teacher_episode(np.random.default_rng(seed), bidirectional)
    search = Search(domain, task, bidirectional)
    for action in actions:
        search.step(action)
    program, known = search.program(), {primitive.name: primitive for primitive in domain.primitives}
    for *inputs, output in zip(*task.inputs, task.target, strict=True):
        assert run(program, inputs) == output
    assert parse(str(program), known) == program


def test_a_program_is_run_on_the_held_out_examples_too():
    domain = small_arc()
    (task,) = domain.held_out("tasks")
    names = [operation.name for operation in domain.operations]

    def solved(task):
        search = Search(domain, task)
        search.step(Action(names.index("flip_h"), (0,)))
        search.step(Action(names.index("hstack"), (0, 2)))
        assert search.solved
        return search

    assert str(solved(task).program()) == "(hstack $0 (flip_h $0))"
    assert solved(task).generalises()
    wrong = arc.arc_task("mirror", [([[1, 2]], [[1, 2, 2, 1]])], [([[3, 0]], [[3, 0, 3, 0]])])
    assert not solved(wrong).generalises()


def test_an_open_node_that_is_made_forward_ends_the_search():
    domain = DOMAINS["24-game"]()
    names = [operation.name for operation in domain.operations]
    search = Search(domain, game24.task_of((2, 3, 5, 8), 24, 1))
    step = search.step(Action(names.index("*:1"), (4, 3)))  # 24 = 8 × ?
    assert step.changed
    assert search.solved
    assert str(search.program()) == "(* $3 $1)"
    search = Search(domain, game24.task_of((1, 2, 3, 9), 45, 2))
    assert search.step(Action(names.index("*:0"), (4, 3))).node == 5  # 45 = ? × 9
    assert search.nodes[5] == Node((5,), False)
    assert search.step(Action(names.index("+"), (1, 2))).changed
    assert str(search.program()) == "(* (+ $1 $2) $3)"


@domains
def test_masks_know_how_many_arguments_and_what_is_grounded_and_nothing_else(domain):
    domain = domain()
    for bidirectional in (True, False):
        search = Search(domain, domain.random_task(np.random.default_rng(0)), bidirectional)
        operations, arguments = search.structural_mask()
        assert operations.shape == (len(domain.operations),)
        assert arguments.shape == (len(domain.operations), domain.argument_slots, domain.max_nodes)
        for at, operation in enumerate(domain.operations):
            assert operations[at] == (bidirectional or operation.missing is None)
            for slot in range(domain.argument_slots):
                must = operation.grounded[slot] if slot < len(operation.grounded) else None
                assert arguments[at, slot, : len(search.nodes)].tolist() == [n.grounded is must for n in search.nodes]
                assert not arguments[at, slot, len(search.nodes) :].any()


def test_steps_that_are_structurally_impossible_are_refused():
    domain = DOMAINS["24-game"]()
    task = game24.task_of((1, 2, 3, 4), 24, 3)
    with pytest.raises(ValueError, match="takes nodes that are grounded"):
        Search(domain, task).step(Action(0, (0, 4)))
    with pytest.raises(ValueError, match="forward only"):
        Search(domain, task, bidirectional=False).step(Action(4, (4, 0)))
    search = Search(domain, Task(task.inputs, task.target, 0))
    with pytest.raises(ValueError, match="over"):
        search.step(Action(0, (0, 1)))


def test_edges_know_which_way_they_were_found(tmp_path):
    domain = DOMAINS["arc-symmetry"]()
    index = {operation.name: at for at, operation in enumerate(domain.operations)}
    task = domain.held_out("tasks")[0]
    for backward in (False, True):
        search = Search(domain, task)
        flipped = search.step(Action(index["flip_h"], (0,))).node
        search.step(Action(index["hstack:1"], (1, 0)) if backward else Action(index["hstack"], (0, flipped)))
        assert search.solved
        assert [edge.backward for edges in search.graph.edges for edge in edges].count(True) == backward
        drawing.draw(search, tmp_path / "graph.svg")
        assert ("stroke-dasharray" in (tmp_path / "graph.svg").read_text()) == backward
