"""One budget for several scans of a program."""

from __future__ import annotations

from bptt_jax._budget import budget_to_bytes
from bptt_jax._device.free_bytes import free_bytes
from bptt_jax.errors import as_count

_SOME = 1_000_000  # bytes of a scan; whether a budget is a percentage shows in whether it depends on them


def share_budget(budget: int | str | None, layers: int) -> int | str | None:
    """The part of one budget that each of several layers gets, so that all together keep it.

    While a layer goes backwards, those below hold the arrays that they saved, never more than their own parts. A
    percentage is of the bytes that `jax.lax.scan` would need for the gradient of each layer, so it is the same for
    each. The sequences between the layers are no part of it.

    Args:
      budget: as in `bptt_jax.scan`; "auto" is taken at once, not when the layers are differentiated.
      layers: how many layers there are, the two directions of a bidirectional one being two.

    Raises:
      TypeError, ValueError: for a malformed budget, and if there is not a byte for each layer.

    >>> share_budget("64MiB", 4), share_budget("5%", 4)
    (16777216, '5%')
    """
    layers = as_count(layers, 1, "layers")
    if budget == "auto":
        return max(free_bytes() // layers, 1)
    everything = budget_to_bytes(budget, _SOME)
    if everything is None or everything != budget_to_bytes(budget, 2 * _SOME):
        return budget
    if everything < layers:
        raise ValueError(f"budget={budget!r} is {everything} bytes, too little for {layers} layers.")
    return everything // layers
