"""Declare config classes. `build_config.py` builds their instances from the plain values of YAML files and overrides.

A config class is a dataclass that derives from `Section`. A field is a bool, int, float, str, a Literal, another
Section, a list of these, or one of them "| None"; `option` gives it limits, which are checked when a recipe is read.
`Section` records which fields were read, so that a key without any effect is an error, too (`unread`). This module does
not import torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import yaml


class Section:
    """Base class of every config dataclass.

    `name` is set for a section that is chosen by name (`model`, `objective`).
    """

    name: str = ""
    _defaults: dict[str, Any] = {}  # set on an instance: values that replace the defaults of the class
    shorthand: ClassVar[str] = "value"  # `lr: 0.1` means `lr: {value: 0.1}`
    advice: ClassVar[dict[str, str]] = {}  # {a key that users may look for: what to write instead}
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
        """Yield (suffix of the key, number) for each number of this section that must be within the limits of the field
        that holds the section."""
        yield from ()

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        self.__dict__.setdefault("_read", set())  # shared: reading the copy counts as reading the recipe's section
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    def settled(self) -> Self:
        """A deep copy whose reads are not recorded, for code that runs in every step: the record should not depend on
        the branches that a step takes, and recording is a side effect in code that torch.compile traces."""
        copy: Self = object.__new__(_unrecorded(type(self)))
        copy.__dict__.update({key: _settled(value) for key, value in vars(self).items() if key != "_read"})
        return copy


def _settled(value: Any) -> Any:
    if isinstance(value, list):
        return [_settled(item) for item in value]
    return value.settled() if isinstance(value, Section) else value


def _unrecorded(cls: type) -> type:
    """A subclass of `cls` that does not record which fields are read."""
    if cls.__getattribute__ is object.__getattribute__:
        return cls
    if "_unrecorded" not in vars(cls):
        own = {"__getattribute__": object.__getattribute__, "__module__": cls.__module__, "__doc__": cls.__doc__}
        cls._unrecorded = type(cls.__name__, (cls,), own)  # type: ignore[attr-defined]
    return cls._unrecorded  # type: ignore[attr-defined]


def config_class(section: Section) -> type:
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

    def allow(self, value: float) -> bool:
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
    samples: int  # number of samples in the data; if that is unknown, the number that the run trains on
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of the model, such as image_size
    classes: int = 0  # number of names of classes that the manifests of the data list; 0 without them
    pixels: str = ""  # the dtype that keeps all bits of the images in the data; "": unknown, or there are no images
    key: str = ""  # the option that is set
    section: dict[str, Any] = dataclasses.field(default_factory=dict)  # all options of the section that holds it
    previous_run: Callable[[], dict[str, Any]] = dict  # that section in the run from which this one starts, or {}
    # what the weights that `init.backbone` names state about themselves, such as `pool`; {} without them
    backbone: Callable[[], dict[str, Any]] = dict


Rule = Callable[[Facts], Any]


def option(
    default: Any,
    *,
    auto: Rule | Sequence[Rule] = (),
    former_default: Any = None,
    metadata: dict[str, Any] | None = None,
    **limits: float,
) -> Any:
    """A field with limits, and with a rule that sets `auto`: `share: float | Literal["auto"] = option(0.15, low=0,
    high=1, auto=rule)`.

    `default`: the default value, or a function that makes it. `limits`: those of `Limits`; they apply to a number, to
    each number of a list, and to each value of a schedule, but not to null or `auto`. `auto`: a function of `Facts`
    that returns the value, or None if it has none; the first line of its docstring states the rule. Of several rules,
    the first that returns a value counts. `former_default`: the default of an earlier version, which stored recipes
    may hold.
    """
    rules = (auto,) if callable(auto) else tuple(auto)
    merged = {"limits": Limits(**limits) if limits else None, "auto": rules, "former_default": former_default}
    merged |= metadata or {}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=merged)
    return dataclasses.field(default=default, metadata=merged)


def option_if(default: Any, key: str, *values: Any, unless: Any = None, **more: Any) -> Any:
    """A field that has an effect only if the field `key` of the same section has one of `values`, or, without `values`,
    any value but `unless`.

    If a later layer of a recipe gives `key` another value, the value of this field from an earlier layer is dropped.
    `more`: arguments of `option`.
    """
    return option(default, metadata={"only": (key, values, unless)}, **more)


def fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


# ---------------------------------------------------------------- plain values of a section; which fields were read
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


def unread(section: Section, prefix: str = "", default_section: Any = None) -> list[tuple[str, Any]]:
    """(dotted key, value) of every field that differs from its default and was not read.

    `default_section`: the default of the field that holds this section.
    """
    stored, out = vars(section), []
    defaults = vars(default_section) if isinstance(default_section, type(section)) else {}
    defaults = defaults | stored.get("_defaults", {})
    for key, field in fields(type(section)).items():
        value, default = stored[key], defaults.get(key, default_of(field))
        if _items(value):
            for n, item in enumerate(_items(value)):
                where = f"{prefix}{key}[{n}]." if isinstance(value, list) else f"{prefix}{key}."
                out += unread(item, where, None if isinstance(value, list) else default)
        elif key not in stored.get("_read", ()) and value not in (default, *_defaults(field)):
            out.append((prefix + key, value))
    return out


def count_as_read(section: Section, keys: Iterable[str]) -> None:
    """Count fields as read, and all fields of the sections in them, except fields without an effect (see `only`)."""
    stored = vars(section)
    for key, field in fields(type(section)).items():
        chooser, allowed, excluded = field.metadata.get("only", ("", (), None))
        if key not in keys or (chooser and not has_effect(stored[chooser], allowed, excluded)):
            continue
        stored.setdefault("_read", set()).add(key)
        for item in _items(stored[key]):
            count_as_read(item, fields(type(item)))


def has_effect(value: Any, allowed: tuple, excluded: Any) -> bool:
    """Whether a field that is `only` for some values of another one has an effect for this value."""
    return value in allowed if allowed else value != excluded


def _defaults(field: dataclasses.Field) -> list[Any]:
    """The default of a field, and that of an earlier version if there is one (see `option`)."""
    former = field.metadata.get("former_default")
    return [default_of(field)] if former is None else [default_of(field), former]


def default_of(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
