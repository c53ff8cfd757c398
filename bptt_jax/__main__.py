"""`python -m bptt_jax`; see `bptt_jax._cli.commands`."""

try:
    from bptt_jax._cli.commands import main
except ModuleNotFoundError as error:
    if error.name not in ("click", "rich"):
        raise
    raise SystemExit(
        f"the command line of bptt_jax needs {error.name}; install it with: python -m pip install 'bptt_jax[cli]'"
    ) from error

if __name__ == "__main__":
    main(prog_name="python -m bptt_jax")
