"""Runs the notebooks at their full setting and writes what they show into them.

python notebooks/execute.py            # all
python notebooks/execute.py 04         # those whose names begin so
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from rich.progress import track


def main() -> None:
    chosen = tuple(sys.argv[1:]) or ("",)
    paths = [path for path in sorted(Path(__file__).parent.glob("*.ipynb")) if path.name.startswith(chosen)]
    if not paths:
        sys.exit(f"no notebook's name begins with {' or '.join(chosen)}")
    for path in track(paths, "notebooks"):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False).execute(cwd=path.parent)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
