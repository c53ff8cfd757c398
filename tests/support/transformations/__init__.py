"""The transformations of JAX, each with the situation that it stands for, as one table."""

from tests.support.transformations import batches, derivatives, modes, programs
from tests.support.transformations.table import ROWS

__all__ = ["ROWS", "batches", "derivatives", "modes", "programs"]
