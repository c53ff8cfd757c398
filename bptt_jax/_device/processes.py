"""Agreement of the processes of a job: all must compile the same program, so they plan from the same numbers."""

from __future__ import annotations

import concurrent.futures

import jax
import numpy as np
import numpy.typing as npt


def greatest_of_processes(size: float) -> float:
    """The greatest `size` of all processes; each of them has to call this."""
    return float(np.max(_of_all(size)))


def least_of_processes(size: float) -> float:
    """The least `size` of all processes; each of them has to call this."""
    return float(np.min(_of_all(size)))


def _of_all(size: float) -> npt.NDArray[np.float64]:
    if jax.process_count() == 1:
        return np.asarray([size])
    from jax.experimental import multihost_utils  # a single process need not have its imports

    # As bytes, because JAX without double precision would round. In a thread of its own, because nothing is traced
    # there, so no mesh's axes are in the way.
    given = np.frombuffer(np.float64(size).tobytes(), dtype=np.uint8)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        found = thread.submit(multihost_utils.process_allgather, given).result()
    return np.asarray(found, dtype=np.uint8).reshape(-1).view(np.float64)
