"""The scan as primitives, and their rules, registered when this room is imported."""

from bptt_jax._primitives import curvature, gradient, scan

__all__ = ["curvature", "gradient", "scan"]
