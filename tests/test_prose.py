"""Docstrings and comments of the package are plain: "what" and "that" are rare, for a noun says more."""

from pathlib import Path

import pytest

import bptt_jax
from tests.support.prose import per_thousand, prose_of

PACKAGE = Path(bptt_jax.__file__).parent
ROOMS = sorted(path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")
MOST = {"what": 3, "that": 10}  # in a thousand words


@pytest.mark.parametrize("word", MOST)
@pytest.mark.parametrize("room", [*ROOMS, PACKAGE], ids=lambda path: path.name)
def test_words_that_stand_for_nouns_are_rare(room, word):
    text = "\n".join(map(prose_of, sorted(room.rglob("*.py"))))
    assert per_thousand(word, text) <= MOST[word]


def test_words_are_counted_in_docstrings_and_comments_only(tmp_path):
    source = 'def f(that):\n    """What one does."""\n    return "what", that  # what: the reason\n'
    (tmp_path / "f.py").write_text(source)
    text = prose_of(tmp_path / "f.py")
    assert sorted(text.lower().split()) == ["does.", "one", "reason", "the", "what", "what:"]
    assert per_thousand("what", text) == pytest.approx(1000 / 3)
