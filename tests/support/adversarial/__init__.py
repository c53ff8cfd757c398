"""Steps that a lowering which moves work across the time loop could get silently wrong."""

# Imported because each enters its steps in the table; no name of theirs is used here.
from tests.support.adversarial import carries, cells, control, precision, products, randomness, rules, weights  # noqa: F401
from tests.support.adversarial.table import TABLE, Adversary

__all__ = ["TABLE", "Adversary"]
