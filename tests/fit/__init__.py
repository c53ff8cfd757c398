"""Derives fitted numbers of `bptt_jax/_figures.py` again, on this machine, with this JAX."""
