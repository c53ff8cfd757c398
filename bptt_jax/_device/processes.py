"""What the processes of a job agree on: all of them must compile the same program, so plan from the same numbers."""

from __future__ import annotations

import concurrent.futures

import jax
import numpy as np
import numpy.typing as npt


def greatest_of_processes(size: float) -> float:
    """The greatest of all processes, each of which has to call this."""
    return float(np.max(_of_all(size)))


def least_of_processes(size: float) -> float:
    """The least of all processes, each of which has to call this."""
    return float(np.min(_of_all(size)))


def _of_all(size: float) -> npt.NDArray[np.float64]:
    if jax.process_count() == 1:
        return np.asarray([size])
    from jax.experimental import multihost_utils  # imports what single processes need not have

    # As bytes, because JAX without double precision would round. In a thread of its own nothing is being traced, so
    # there is no mesh whose axes would be in the way.
    given = np.frombuffer(np.float64(size).tobytes(), dtype=np.uint8)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        found = thread.submit(multihost_utils.process_allgather, given).result()
    return np.asarray(found, dtype=np.uint8).reshape(-1).view(np.float64)
