"""`python -m bptt_jax bench`: this library beside `jax.lax.scan` and other ways to bound its memory, on this device."""
