"""Types of the command line's arguments; each error names valid values."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import click

from bptt_jax._budget import Budget, budget_to_bytes

_SIZES = "bytes such as 4096, 32KiB, 190kB or 1.5MiB"


def size(text: str) -> int:
    """Bytes: 4096, 32KiB, 1.5MB, 0."""
    try:
        if re.fullmatch("0+B?", text):  # a step may have no x, y or parameters, but a budget of 0 is refused
            return 0
        if "%" not in text:
            return budget_to_bytes(_number_or_text(text), 0) or 0
    except ValueError:
        pass
    raise click.BadParameter(f"{text!r} is not a size: use {_SIZES}, or 0.")


def budget_of(text: str, others: str = "5% or none") -> Budget:
    """A budget as in `bptt_jax.scan`: bytes, 64MiB, 5%, none."""
    if text.lower() == "none":
        return None
    try:
        budget_to_bytes(_number_or_text(text), 1)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a budget here: use {_SIZES}, {others}.") from None
    return _number_or_text(text)


def budget_or_auto(text: str) -> Budget:
    """A budget as in `bptt_jax.scan`: bytes, 64MiB, 5%, auto, none."""
    return "auto" if text.lower() == "auto" else budget_of(text, "5%, auto or none")


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def seconds_of(text: str) -> float:
    """A time to wait for: positive, finite seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise click.BadParameter(f"{text!r} is not a time: use seconds above 0, such as 5 or 0.5.")
    return seconds


def pair(text: str) -> tuple[int, int]:
    """Batch and width: 16x256."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is not a size: use batch x width, such as 16x256.")
    return int(found[1]), int(found[2])


class Output(click.Path):
    """A file to write, refused before anything is computed if its folder does not exist or its suffix is another."""

    def __init__(self, suffix: str = ""):
        super().__init__(dir_okay=False, writable=True)
        self._suffix = suffix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        folder = path.absolute().parent
        if not folder.is_dir():
            self.fail(f"there is no directory {folder} to write {path.name} into.", param, ctx)
        if self._suffix and path.suffix.lower() != self._suffix:
            self.fail(f"{path.name!r} is no file name that ends in {self._suffix}.", param, ctx)
        return path
