"""The loops of a plan that keep values in the memory of the host."""

from __future__ import annotations

from bptt_jax.plans._nodes import Plan, Repeat


def uses_host(plan: Plan) -> bool:
    """Whether a loop of a plan keeps values on the host.

    >>> from bptt_jax import Chain, Remat, Repeat, Steps
    >>> uses_host(Chain((Repeat(40, Remat(Steps(25)), kept="host"), Steps(9))))
    True
    """
    return plan._uses_host


def host_loops(plan: Plan) -> list[Repeat]:
    """The loops of a plan that keep values on the host; a loop over one child keeps them on the device.

    >>> from bptt_jax import Chain, Remat, Repeat, Steps
    >>> host_loops(Chain((Repeat(40, Remat(Steps(25)), kept="host"), Steps(9))))
    [Repeat(k=40, child=Remat(child=Steps(n=25)), kept='host')]
    """
    found, todo = [], [plan] if plan._uses_host else []
    while todo:
        node = todo.pop()
        if isinstance(node, Repeat):
            found.extend([node] if node.k > 1 and node._length else [])
        else:
            todo.extend(child for child in reversed(node._children) if child._uses_host)
    return found
