"""One budget for several scans of a program."""

from __future__ import annotations

from bptt_jax._budget import budget_to_bytes, is_percentage
from bptt_jax._device.free_bytes import free_bytes
from bptt_jax.errors import as_count


def share_budget(budget: int | str | None, layers: int) -> int | str | None:
    """The part of one budget for each of several layers: with it, all of them together keep the budget.

    Equal parts suffice, because the layers below a running backward pass hold only their saved arrays, never more than
    their own parts. A percentage refers to the bytes `jax.lax.scan` would need for the gradient of each layer, so it is
    the same for each. The budget does not cover the sequences between the layers.

    Args:
      budget: as in `bptt_jax.scan`; "auto" is evaluated at once, not when the layers are differentiated.
      layers: the number of layers; a bidirectional one counts as two.

    Raises:
      TypeError, ValueError: for a malformed budget, and for one of fewer bytes than layers.

    >>> share_budget("64MiB", 4), share_budget("5%", 4)
    (16777216, '5%')
    """
    layers = as_count(layers, 1, "layers")
    if budget == "auto":
        return max(free_bytes() // layers, 1)
    everything = budget_to_bytes(budget, 0)
    if everything is None or is_percentage(budget):
        return budget
    if everything < layers:
        raise ValueError(f"budget={budget!r} is {everything} bytes, too little for {layers} layers.")
    return everything // layers
