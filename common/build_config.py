"""Build config dataclasses (`config.py`) from the plain values of YAML files and overrides (`yaml_values.py`). Every
error names the file, the key, the value and the nearest valid names.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union

from common.config import Section, default_of, fields, has_effect, sections
from common.errors import ConfigError, nearest
from common.yaml_values import Origin


def build(cls: type, values: dict, origin: Origin, prefix: str = "", defaults: dict | None = None) -> Any:
    """An instance of the dataclass `cls` from plain `values`; `defaults` replace those of the class (a preset)."""
    hints = typing.get_type_hints(cls)
    known = fields(cls)
    for key, value in values.items():
        if key not in known:
            advice = getattr(cls, "advice", {}).get(key) or nearest(str(key), known)
            raise ConfigError(f"{_where(origin, prefix + key)}{prefix}{key} = {value!r}: no such key; {advice}")
    values = _in_effect(values, known, origin, prefix)
    given = dict(defaults or {})
    given |= {key: convert(value, hints[key], origin, prefix + key, known[key]) for key, value in values.items()}
    missing = [f for f, field in known.items() if f not in given and default_of(field) is dataclasses.MISSING]
    if missing:
        raise ConfigError(
            f"{_where(origin, prefix)}{prefix}{missing[0]} is missing; write {prefix}{missing[0]}:"
            f" {_type_name(hints[missing[0]])}"
        )
    instance = cls(**given)
    instance._defaults = defaults or {}
    try:
        instance.check()
    except ValueError as error:
        raise ConfigError(f"{_where(origin, str(error).partition(' ')[0])}{error}") from None
    for section in sections(instance):
        vars(section).pop("_read", None)  # reading an option in a check does not count
    return instance


def _in_effect(
    values: dict[str, Any], known: dict[str, dataclasses.Field], origin: Origin, prefix: str
) -> dict[str, Any]:
    """`values` without those of an earlier layer that have no effect after the choice of a later layer (see `only`)."""
    places = {key: place for place, key in enumerate(origin)}

    def is_overruled(key: str) -> bool:
        chooser, allowed, excluded = known[key].metadata.get("only", ("", (), None))
        if chooser not in values or has_effect(values[chooser], allowed, excluded):
            return False
        own, other = (_set_by(origin, prefix + name) for name in (key, chooser))
        return origin.get(own) != origin.get(other) and places.get(own, 0) < places.get(other, 0)

    return {key: value for key, value in values.items() if not is_overruled(key)}


def _set_by(origin: Origin, key: str) -> str:
    """The key of `origin` under which the source of `key` is recorded: `key` itself or, for a section, its first
    key."""
    return key if key in origin else next((k for k in origin if k.startswith(key + ".")), key)


def convert(value: Any, hint: Any, origin: Origin, key: str, field: dataclasses.Field | None = None) -> Any:
    """Convert `value` to the type `hint`. Raises ConfigError that names the file, the key and the value."""
    if field is not None and "choose" in field.metadata:  # a section chosen by its name
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ConfigError(f"{_where(origin, key)}{key}.name is missing; write {key}: {{name: ...}}")
        cls, defaults = field.metadata["choose"](value["name"], _where(origin, key + ".name"))
        chosen = build(cls, {k: v for k, v in value.items() if k != "name"}, origin, key + ".", defaults)
        chosen.name = value["name"]
        return chosen
    choices = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in choices:
        return None
    if isinstance(value, dict) and not all(_is_section(c) for c in choices if c is not type(None)):
        value = {k: v for k, v in value.items() if k}  # a plain value of an earlier layer, which a mapping replaces
    for choice in choices:
        if choice is not type(None):
            ok, result = _convert_one(value, choice, origin, key)
            if ok:
                check_limits(result, origin, key, field, type(None) in choices)
                return result
    raise ConfigError(f"{_where(origin, key)}{key} = {value!r}: expected {_type_name(hint)}{_hint_for(value, choices)}")


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def check_limits(
    value: Any, origin: Origin, key: str, field: dataclasses.Field | None, null: bool = False, reason: str = ""
) -> None:
    """Raises ConfigError for the first number of an option's value that is outside the limits of its field. `reason`:
    why the option has this value."""
    limits = field.metadata.get("limits") if field is not None else None
    for part, number in _numbers(value) if limits is not None else ():
        if not limits.allow(number):
            or_null = ", or null" if null else ""
            raise ConfigError(f"{_where(origin, key)}{key}{part} = {number}{reason}: must be {limits}{or_null}")


def _numbers(value: Any) -> Iterator[tuple[str, float]]:
    """(suffix of the key, number) of every number in a value."""
    if isinstance(value, list):
        for n, item in enumerate(value):
            yield from ((f"[{n}]{part}", number) for part, number in _numbers(item))
    elif isinstance(value, Section):
        yield from value.numbers()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield "", value


def _convert_one(value: Any, hint: Any, origin: Origin, key: str) -> tuple[bool, Any]:
    """(whether `value` can be converted to `hint`, which is no union; the converted value)."""
    if _is_section(hint):
        values = dict(value) if isinstance(value, dict) else {"": value}
        if "" in values:
            if hint.shorthand not in fields(hint):
                return False, None
            values = {hint.shorthand: values.pop("")} | values
        return True, build(hint, values, origin, key + ".")
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            value = [value]  # `train: shards/` is a list of one
        (item,) = typing.get_args(hint)
        return True, [convert(v, item, origin, f"{key}[{i}]") for i, v in enumerate(value)]
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint), value
    if hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return True, float(value)
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
            try:
                return True, float(value)
            except ValueError:
                return False, None
        return False, None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint is str and isinstance(value, Path):
        return True, str(value)
    return isinstance(hint, type) and isinstance(value, hint), value


def _where(origin: Origin, key: str) -> str:
    """ "FILE: ": the file that set a key or, if that is not recorded, the nearest section that contains the key."""
    parts = key.rstrip(".").split(".")
    for n in range(len(parts), 0, -1):
        head = ".".join(parts[:n]).split("[")[0]
        if head in origin:
            return origin[head] + ": "
        inside = [source for k, source in origin.items() if k.startswith(head + ".")]
        if inside:
            return inside[-1] + ": "
    return (next(iter(origin.values())) + ": ") if origin else ""


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(h) for h in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is list:
        return "a list of " + _type_name(typing.get_args(hint)[0])
    if _is_section(hint):
        return (
            "a mapping with " + ", ".join(fields(hint))
            if dataclasses.is_dataclass(hint)
            else "a name, or a mapping with name"
        )
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _hint_for(value: Any, choices: tuple) -> str:
    for choice in choices:
        if typing.get_origin(choice) is Literal and isinstance(value, str):
            return f"; {nearest(value, map(str, typing.get_args(choice)))}"
    return ""
