"""The command line, `python -m bptt_jax`."""
