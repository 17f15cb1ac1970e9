"""Entries of a config.json or of GGUF metadata: numbers that must be numbers, and values that change nothing.
"""
import re

CUTS_OFF = re.compile(r"cap|window|clip")  # keys of numbers that 0 switches off; all others are neutral at 1


def is_neutral(key: str, value: object) -> bool:
    """Whether a value that another family would use, such as a scale, changes nothing here."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return all(is_neutral(key, inner) for inner in value)
    if isinstance(value, str):
        return value in ("", "none", "default")
    if value is None or isinstance(value, bool):
        return not value
    return value == (0 if CUTS_OFF.search(key.lower()) else 1)


def positive(raw: dict, key: str, default: float | None = None, kind: type = int) -> int | float:
    """raw[key] as a whole number from 1 to 2^31 - 1 or, with kind=float, as a number above 0 and below 1e30. Missing or
    null: the default. Without a default a missing entry is a KeyError; anything else is a ValueError."""
    value = raw[key] if default is None else raw.get(key)
    if value is None and default is not None:
        value = default
    if kind is int:
        kinds, limit, adjective = int, 2**31, "positive whole"
    else:
        kinds, limit, adjective = (int, float), 1e30, "positive"
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < limit:  # NaN is not above 0 either
        raise ValueError(f"{key} should be a {adjective} number, not {value!r}")
    return kind(value)
