"""The device compiled for: bytes of arrays on it, its free memory, and whether an arrangement of products pays."""
