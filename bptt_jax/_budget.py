"""Budgets: from the forms users write to bytes."""

from __future__ import annotations

import difflib
import fractions
import math
import numbers
import re

Budget = int | str | None

_UNITS = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("kMGT", start=1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", start=1)},
}
_UNITS["KB"] = _UNITS["kB"]
_MEANT = {"percent": "%", "pct": "%", "bytes": "B"}
for _unit, _name in {"kB": "kilobytes", "MB": "megabytes", "GB": "gigabytes", "TB": "terabytes"}.items():
    _MEANT |= dict.fromkeys((_unit[0].lower(), _name, _name.removesuffix("s")), _unit)
_SHAPE = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>%|[A-Za-z]+)\s*")
_NUMBERS = 'bytes as an int, a string such as "64MiB", "1.5GB" or "5%", or None for no limit'
_ON_HOST = _NUMBERS.replace("for no limit", "for none there")
_LIMITS = 'bytes as an int, a string such as "14GiB" or "1.5GB", or "auto" for what the device has'
_FORMS = _NUMBERS.replace(", or None", ', "auto" for what the device has free, or None')


def budget_to_bytes(budget: object, store_all_bytes: int, name: str = "budget") -> int | None:
    """The bytes of a budget; None where it sets no limit.

    Args:
      budget: None, a positive int, or a string: a number with a unit (B, kB, MB, GB, TB in powers of 1000, KiB, MiB,
        GiB, TiB in powers of 1024), or a percentage of `store_all_bytes`.
      store_all_bytes: temporary bytes of `jax.lax.scan`'s own vjp at this length.
      name: of the argument, for errors.

    Raises:
      TypeError, ValueError: for anything else; the message has the accepted forms.

    >>> budget_to_bytes("1.5KiB", 0), budget_to_bytes("5%", 1000), budget_to_bytes(None, 7)
    (1536, 50, None)
    """
    if budget is None:
        return None
    forms = _FORMS if name == "budget" else _ON_HOST
    if budget == "auto" and name != "budget":
        raise ValueError(f'{name}="auto" is not known: JAX does not tell what a host has free; use {forms}.')
    if budget == "auto":
        raise ValueError(f'budget="auto" is for what knows a device (scan, explain, layers); here use {_NUMBERS}.')
    if isinstance(budget, str):
        bytes_ = _parse(budget, store_all_bytes, name, forms)
    elif not isinstance(budget, bool) and isinstance(budget, numbers.Integral):
        bytes_ = int(budget)
    else:
        kind, meant = type(budget).__name__, ""
        if isinstance(budget, float) and 0 < budget < math.inf:
            # Below 1 a share is probably meant, up to 100 per cent or bytes, above that bytes, for example 1e9.
            share = f"{100 * budget:g}%" if budget < 1 else f"{budget:g}%"
            alike = [repr(share)] * (budget <= 100) + [str(int(budget))] * (budget >= 1)
            meant = f" Did you mean {', or '.join(alike)}?"
        raise TypeError(f"{name}={budget!r} of type {kind} is not a budget; use {forms}.{meant}")
    if bytes_ <= 0:
        raise ValueError(f"{name}={budget!r} is {bytes_} bytes, but a budget must be positive; use {forms}.")
    return bytes_


def limit_to_bytes(within: object) -> int:
    """The bytes of a limit for a whole program: a positive int, or a string as for a budget, without percentages.

    Raises:
      TypeError, ValueError: for anything else; the message has the accepted forms.

    >>> limit_to_bytes("14GiB") == limit_to_bytes(14 * 1024**3)
    True
    """
    if isinstance(within, str):
        if is_percentage(within):
            raise ValueError(
                f"within={within!r} is a share, but of no number: the limit of a whole program is that of a device; "
                f"use {_LIMITS}."
            )
        match = _SHAPE.fullmatch(within)
        if match is None or match["unit"] not in _UNITS:
            raise ValueError(f"within={within!r} is not a limit; use {_LIMITS}.{_meant_limit(within, match)}")
        bytes_ = int(fractions.Fraction(match["number"]) * _UNITS[match["unit"]])
    elif not isinstance(within, bool) and isinstance(within, numbers.Integral):
        bytes_ = int(within)
    else:
        is_whole = isinstance(within, float) and math.isfinite(within) and within >= 1
        meant = f" Did you mean {int(within)}?" if is_whole else ""  # type: ignore[call-overload]
        raise TypeError(f"within={within!r} of type {type(within).__name__} is not a limit; use {_LIMITS}.{meant}")
    if bytes_ <= 0:
        raise ValueError(f"within={within!r} is {bytes_} bytes, but a limit must be positive; use {_LIMITS}.")
    return bytes_


def is_percentage(budget: object) -> bool:
    """Whether a budget is a share of the bytes of `jax.lax.scan`.

    >>> is_percentage("5%"), is_percentage("5MiB")
    (True, False)
    """
    return isinstance(budget, str) and "%" in budget


def _parse(budget: str, store_all_bytes: int, name: str, forms: str) -> int:
    match = _SHAPE.fullmatch(budget)
    if match is None:
        text = budget.strip()
        meant = {"auto": " Did you mean 'auto'?", "none": " Did you mean None?"}.get(text.lower(), _without_unit(text))
        raise ValueError(f"{name}={budget!r} is not a budget; use {forms}.{meant}")
    number, unit = fractions.Fraction(match["number"]), match["unit"]
    if unit == "%":
        return max(math.ceil(number), int(number * store_all_bytes / 100))  # positive, also without residuals
    if unit not in _UNITS:
        known = _known_unit(unit)
        meant = f" Did you mean '{match['number']}{known}'?" if known else ""
        raise ValueError(
            f"{name}={budget!r} has the unknown unit {unit!r}; the units are %, {', '.join(_UNITS)}.{meant}"
        )
    return int(number * _UNITS[unit])


def _known_unit(unit: str) -> str:
    """The unit that a wrong one is like; empty if there is none."""
    alike = (known for known in _UNITS if known.lower() in (unit.lower(), f"{unit}B".lower()))
    close = difflib.get_close_matches(unit, _UNITS, 1, cutoff=0.7)
    return next(alike, _MEANT.get(unit.lower(), "".join(close)))


def _meant_limit(within: str, match: re.Match[str] | None) -> str:
    """A suggestion for a malformed limit; empty where nothing is like it."""
    if match is not None:
        known = _known_unit(match["unit"])
        return f" Did you mean '{match['number']}{known}'?" if known and known != "%" else ""
    text = within.strip()
    return " Did you mean 'auto'?" if text.lower() == "auto" else _without_unit(text).replace(f"'{text}%', or ", "")


def _without_unit(text: str) -> str:
    """A suggestion for a number without a unit; empty for other text."""
    try:
        number = float(text)
    except ValueError:
        return ""
    if not (math.isfinite(number) and number > 0):
        return ""
    if number.is_integer():
        return f" Did you mean {int(number)}, or '{int(number)}B'?"
    return f" It has no unit: did you mean '{text}%', or '{text}GiB'?"
