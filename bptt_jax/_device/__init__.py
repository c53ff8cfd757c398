"""The device that is compiled for: how large arrays are there, and which arrangement of products pays."""
