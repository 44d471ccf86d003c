"""Config: typed dataclasses from the plain values of YAML files and overrides (`yaml_values.py`). Every error names the
file, the key, the value and the nearest valid names.

A config class is a dataclass that derives from `Section`. A field is a bool, int, float, str, a Literal, another
Section, a list of these, or one of them "| None"; `option` gives it limits, which are checked when a recipe is read.
`Section` records which fields were read, so that a key without any effect is an error, too (`unread`). This module does
not import torch.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union

import yaml

from common.errors import nearest
from common.yaml_values import ConfigError, Origin


class Section:
    """Base class of every config dataclass.

    `name` is set for a section that is chosen by name (`model`, `objective`).
    """

    name: str = ""
    _defaults: dict[str, Any] = {}  # of an instance: values that replace the defaults of the class
    shorthand: ClassVar[str] = "value"  # `lr: 0.1` means `lr: {value: 0.1}`
    _unrecorded: ClassVar[type | None] = None  # the class of `settled` copies

    def __getattribute__(self, key: str) -> Any:
        if key in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            self.__dict__.setdefault("_read", set()).add(key)
        return super().__getattribute__(key)

    def check(self) -> None:
        """Check options against each other; called when the section has been read.

        Raises ValueError with the keys, their values and the valid ones.
        """

    def numbers(self) -> Iterator[tuple[str, float]]:
        """(suffix of the key, number) of each number of this section to which the limits of the field around it
        apply."""
        yield from ()

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        self.__dict__.setdefault("_read", set())  # shared: reading the copy counts as reading the recipe's section
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    def settled(self) -> Self:
        """A deep copy whose reads are not recorded, for code that runs in every step: what is recorded should not depend
        on a step's branches, and a record of each read is a side effect in code that torch.compile traces."""
        copy: Self = object.__new__(_unrecorded(type(self)))
        copy.__dict__.update({key: _settled(value) for key, value in vars(self).items() if key != "_read"})
        return copy


def _settled(value: Any) -> Any:
    if isinstance(value, list):
        return [_settled(item) for item in value]
    return value.settled() if isinstance(value, Section) else value


def _unrecorded(cls: type) -> type:
    """`cls` without the record of what is read."""
    if cls.__getattribute__ is object.__getattribute__:
        return cls
    if "_unrecorded" not in vars(cls):
        own = {"__getattribute__": object.__getattribute__, "__module__": cls.__module__, "__doc__": cls.__doc__}
        cls._unrecorded = type(cls.__name__, (cls,), own)  # type: ignore[attr-defined]
    return cls._unrecorded  # type: ignore[attr-defined]


def kind(section: Section) -> type:
    """The class that describes a section's fields, also for a `settled` copy."""
    cls = type(section)
    return cls.__base__ if cls.__getattribute__ is object.__getattribute__ else cls  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Limits:
    """The range of an option: inclusive bounds `low` and `high`, exclusive bounds `above` and `below`."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a number is within the limits; NaN is not."""
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """The limits in words, for messages."""
        if self.low is not None and self.high is not None:
            return f"from {_number(self.low)} to {_number(self.high)}"
        lower = f"{_number(self.low)} or more" if self.low is not None else ""
        lower = f"above {_number(self.above)}" if self.above is not None else lower
        upper = f"at most {_number(self.high)}" if self.high is not None else ""
        upper = f"below {_number(self.below)}" if self.below is not None else upper
        return " and ".join(filter(None, (lower, upper)))


def _number(value: float) -> str:
    """A limit as text: 1048576 and larger powers of two as 2^20."""
    if isinstance(value, int) and value >= 1 << 20 and value.bit_count() == 1:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}"


@dataclasses.dataclass(frozen=True)
class Facts:
    """The arguments of a rule that sets an `auto` value (pretrain/recipes/defaults.py)."""

    steps: int
    batch: int
    samples: int  # of the data; if that is unknown, as many as the run trains on
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of the model, such as image_size
    key: str = ""  # the option that is set
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)  # the other options of its section
    before: Callable[[], dict[str, Any]] = dict  # its section in the run from which this one starts; {} without one


Rule = Callable[[Facts], Any]


def option(
    default: Any,
    *,
    auto: Rule | Sequence[Rule] = (),
    was: Any = None,
    metadata: dict[str, Any] | None = None,
    **limits: float,
) -> Any:
    """A field with limits, and with a rule that sets `auto`: `share: float | Literal["auto"] = option(0.15, low=0,
    high=1, auto=rule)`.

    `default`: the default value, or a function that makes it. `limits`: those of `Limits`; they apply to a number, to
    each number of a list, and to each value of a schedule, but not to null or `auto`. `auto`: a function of `Facts`
    that returns the value, or None if it has none; the first line of its docstring states the rule. Of several rules,
    the first that returns a value counts. `was`: an earlier default, which stored recipes hold.
    """
    rules = (auto,) if callable(auto) else tuple(auto)
    merged = {"limits": Limits(**limits) if limits else None, "auto": rules, "was": was, **(metadata or {})}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=merged)
    return dataclasses.field(default=default, metadata=merged)


def only(default: Any, key: str, *values: Any, unless: Any = None, **more: Any) -> Any:
    """A field that has an effect only if the field `key` of its section has one of `values`, or, without `values`, any
    value but `unless`.

    If a later layer of a recipe gives `key` another value, the value of this field from an earlier layer is dropped.
    `more`: arguments of `option`.
    """
    return option(default, metadata={"only": (key, values, unless)}, **more)


def fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


# ---------------------------------------------------------------- from plain values to dataclasses
def build(cls: type, values: dict, origin: Origin, prefix: str = "", defaults: dict | None = None) -> Any:
    """An instance of the dataclass `cls` from plain `values`; `defaults` replace those of the class (a preset)."""
    hints = typing.get_type_hints(cls)
    known = fields(cls)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(
                f"{_where(origin, prefix + key)}{prefix}{key} = {value!r}: no such key; {nearest(str(key), known)}"
            )
    values = _in_effect(values, known, origin, prefix)
    given = dict(defaults or {})
    given |= {key: convert(value, hints[key], origin, prefix + key, known[key]) for key, value in values.items()}
    missing = [f for f, field in known.items() if f not in given and _default(field) is dataclasses.MISSING]
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
        if chooser not in values or _has_effect(values[chooser], allowed, excluded):
            return False
        own, other = (_set_by(origin, prefix + name) for name in (key, chooser))
        return origin.get(own) != origin.get(other) and places.get(own, 0) < places.get(other, 0)

    return {key: value for key, value in values.items() if not is_overruled(key)}


def _set_by(origin: Origin, key: str) -> str:
    """The key of `origin` that tells where `key` was set: the key itself or, for a section, its first key."""
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
    for choice in choices:
        if choice is not type(None):
            ok, result = _convert_one(value, choice, origin, key)
            if ok:
                _check_limits(result, origin, key, field, type(None) in choices)
                return result
    raise ConfigError(f"{_where(origin, key)}{key} = {value!r}: expected {_type_name(hint)}{_hint_for(value, choices)}")


def _check_limits(value: Any, origin: Origin, key: str, field: dataclasses.Field | None, null: bool) -> None:
    """Raises ConfigError for the first number of an option's value that is outside the limits of its field."""
    limits = field.metadata.get("limits") if field is not None else None
    for part, number in _numbers(value) if limits is not None else ():
        if not limits.hold(number):
            words = f"{limits}{', or null' if null else ''}"
            raise ConfigError(f"{_where(origin, key)}{key}{part} = {number}: must be {words}")


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
    if isinstance(hint, type) and issubclass(hint, Section):
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
    """ "FILE: " with the file that set a key, or the nearest section around it."""
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
    if isinstance(hint, type) and issubclass(hint, Section):
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


# ---------------------------------------------------------------- back to plain values; unread keys
def to_dict(section: Section) -> dict:
    """The plain values of a section and its sub-sections, ready for YAML. This does not count as reading them."""
    stored = vars(section)
    out: dict[str, Any] = {"name": stored["name"]} if "name" in stored and "name" not in fields(type(section)) else {}
    for key in fields(type(section)):
        value = stored[key]
        if isinstance(value, list):
            out[key] = [to_dict(item) if isinstance(item, Section) else item for item in value]
        else:
            out[key] = to_dict(value) if isinstance(value, Section) else value
    return out


def dump(section: Section | dict) -> str:
    """The section, or its values, as YAML."""
    values = to_dict(section) if isinstance(section, Section) else section
    return yaml.safe_dump(values, sort_keys=False, width=120, allow_unicode=True)


def sections(section: Section) -> list[Section]:
    """The section and all its sub-sections."""
    below = [item for key in fields(type(section)) for item in _items(vars(section)[key])]
    return [section] + [deep for value in below for deep in sections(value)]


def _items(value: Any) -> list[Section]:
    """The sections in a value, which is a section, a list, or something else."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Section)]


def unread(section: Section, prefix: str = "", like: Any = None) -> list[tuple[str, Any]]:
    """(dotted key, value) of every field that differs from its default and was not read.

    `like`: the default of the field that holds the section.
    """
    stored, out = vars(section), []
    defaults = (vars(like) if isinstance(like, type(section)) else {}) | stored.get("_defaults", {})
    for key, field in fields(type(section)).items():
        value, default = stored[key], defaults.get(key, _default(field))
        if _items(value):
            for n, item in enumerate(_items(value)):
                where = f"{prefix}{key}[{n}]." if isinstance(value, list) else f"{prefix}{key}."
                out += unread(item, where, None if isinstance(value, list) else default)
        elif key not in stored.get("_read", ()) and value not in (default, *_defaults(field)):
            out.append((prefix + key, value))
    return out


def count_as_read(section: Section, keys: Iterable[str]) -> None:
    """Count fields as read, with all fields of the sections in them, but not those without an effect (see `only`)."""
    stored = vars(section)
    for key, field in fields(type(section)).items():
        chooser, allowed, excluded = field.metadata.get("only", ("", (), None))
        if key not in keys or (chooser and not _has_effect(stored[chooser], allowed, excluded)):
            continue
        stored.setdefault("_read", set()).add(key)
        for item in _items(stored[key]):
            count_as_read(item, fields(type(item)))


def _has_effect(value: Any, allowed: tuple, excluded: Any) -> bool:
    """Whether a field that is `only` for some values of another one has an effect for this value."""
    return value in allowed if allowed else value != excluded


def _defaults(field: dataclasses.Field) -> list[Any]:
    """The default of a field, and an earlier one that stored recipes may hold (see `option`)."""
    was = field.metadata.get("was")
    return [_default(field)] if was is None else [_default(field), was]


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
