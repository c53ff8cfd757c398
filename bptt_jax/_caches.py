"""Every cache of the package: `remember` makes one, and `forget_everything` empties all but those of classes.

Results depend on arguments only, so a cache saves time and never changes a result. The caches of `remember` are
bounded, because a step defined inside its caller is new at each call and would fill them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")

_caches: list[tuple[object, Callable[[], None]]] = []  # each cache with the function emptying it


def remember(most: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator that remembers results of a function by its arguments: the `most` results used last.

    >>> @remember(2)
    ... def double(number):
    ...     print("computed")
    ...     return 2 * number
    >>> double(4), double(4)
    computed
    (8, 8)
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        cached = functools.lru_cache(maxsize=most)(function)
        _caches.append((cached, cached.cache_clear))
        return cast(Callable[P, T], cached)  # an lru_cache does not tell mypy its arguments

    return decorate


def remember_while_alive() -> weakref.WeakKeyDictionary[Any, Any]:
    """A dictionary with weak keys: an entry is dropped when its key is garbage collected."""
    entries: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
    _caches.append((entries, entries.clear))
    return entries


def forget_everything(but: object = None) -> None:
    """Empties all caches but one: for measurements of first calls, and for tests."""
    for cache, empty in _caches:
        if cache is not but:
            empty()


def remember_for_good(function: Callable[P, T]) -> Callable[P, T]:
    """A decorator for makers of classes: never emptied, because an unpickled object needs the very same class again."""
    return cast(Callable[P, T], functools.cache(function))
