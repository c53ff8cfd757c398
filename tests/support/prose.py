"""Words of docstrings and comments, to be counted."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

_CODE = re.compile(r"``?[^`]*``?|^\s*>>>.*$|^\s*\.\.\. .*$", flags=re.MULTILINE)


def prose_of(path: Path) -> str:
    """The docstrings and comments of a source, without code and examples."""
    source = path.read_text()
    return _CODE.sub(" ", "\n".join([*_docstrings(source), *_comments(source)]))


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _comments(source: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ")


def per_thousand(word: str, text: str) -> float:
    """How often a word occurs in a thousand words.

    >>> per_thousand("what", "One does what one can")
    200.0
    """
    words = re.findall(r"[a-z']+", text.lower())
    return 1000 * words.count(word) / max(len(words), 1)
