"""Steps that a lowering which moves work across the time loop could get silently wrong."""

# Imported for what they enter in the table.
from tests.support.adversarial import carries, cells, control, precision, products, randomness, rules, weights  # noqa: F401
from tests.support.adversarial.table import TABLE, Adversary

__all__ = ["TABLE", "Adversary"]
