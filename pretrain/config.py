"""Config: typed dataclasses ← YAML ← dotted overrides, with every mistake named by file, key, value and the nearest valid names.

A config class is a dataclass that derives from `Section`. A field may be a bool, int, float, str, a Literal, another Section, a list of these,
or "| None". `Section` remembers which fields were read, so that a key which changes nothing is an error too (`unread`). Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union

import yaml

from pretrain.errors import UserError, nearest

Origin = dict[str, str]  # dotted key -> the file (or "command line") that set it


class ConfigError(UserError):
    """A recipe or an override that cannot be used."""


class Section:
    """Base of every config dataclass. `name` is set where a section is chosen by name (`model`, `objective`)."""

    name: str = ""
    _defaults: dict[str, Any] = {}  # of an instance: what stands in for the class's own defaults
    shorthand: ClassVar[str] = "value"  # `lr: 0.1` means `lr: {value: 0.1}`

    def __getattribute__(self, key: str) -> Any:
        if key in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            self.__dict__.setdefault("_read", set()).add(key)
        return super().__getattribute__(key)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        self.__dict__.setdefault("_read", set())  # shared: what reads the copy reads the recipe's section
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **changes)
        return copy


def fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


# ---------------------------------------------------------------- reading files and overrides
class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, and reads 1e-3 as the number that it is."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
        seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file."""
    try:
        content = parse_yaml(path.read_text(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file, so no recipe") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, but a recipe is a mapping such as `steps: 1000`")
    return content


def parse_override(text: str) -> tuple[str, Any]:
    """("optim.lr.value", 0.001) from "optim.lr.value=0.001"; the right side is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"command line: {text!r} is no override; write key=value, for example steps=1000")
    return key, parse_yaml(value, f"command line: {key}")


def merge(base: dict, origin: Origin, new: dict, source: str, chosen: set[str], prefix: str = "") -> None:
    """Lay `new` over `base`, in place. Where a section of `chosen` gets another `name`, its old keys go: they belong to another thing."""
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        if dotted in chosen and not isinstance(value, dict):
            value = {"name": value}
        if not isinstance(value, dict):
            base[key], origin[dotted] = value, source
            continue
        below = base.get(key)
        if not isinstance(below, dict):
            below = {} if below is None else {"": below}  # a shorthand met by its long form: `build` gives "" its name
        if dotted in chosen and value.get("name", below.get("name")) != below.get("name"):
            below = {}
        base[key] = below
        origin.setdefault(dotted, source)
        merge(below, origin, value, source, chosen, dotted + ".")


def nest(key: str, value: Any) -> dict:
    """{"a": {"b": value}} from "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


# ---------------------------------------------------------------- from plain values to dataclasses
def build(cls: type, values: dict, origin: Origin, prefix: str = "", defaults: dict | None = None) -> Any:
    """An instance of the dataclass `cls` from plain `values`; `defaults` stand in for the class's own (a preset)."""
    hints = typing.get_type_hints(cls)
    known = fields(cls)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(
                f"{_where(origin, prefix + key)}{prefix}{key} = {value!r}: no such key; {nearest(str(key), known)}"
            )
    given = dict(defaults or {})
    given |= {key: convert(value, hints[key], origin, prefix + key, known[key]) for key, value in values.items()}
    missing = [f for f, field in known.items() if f not in given and _default(field) is dataclasses.MISSING]
    if missing:
        raise ConfigError(
            f"{_where(origin, prefix)}{prefix}{missing[0]} is missing; write {prefix}{missing[0]}: {_type_name(hints[missing[0]])}"
        )
    instance = cls(**given)
    instance._defaults = defaults or {}
    return instance


def convert(value: Any, hint: Any, origin: Origin, key: str, field: dataclasses.Field | None = None) -> Any:
    """`value` as the type `hint`, or a ConfigError that names the file, the key and the value."""
    if field is not None and "choose" in field.metadata:  # a section chosen by its name
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
                return result
    raise ConfigError(f"{_where(origin, key)}{key} = {value!r}: expected {_type_name(hint)}{_hint_for(value, choices)}")


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
        if isinstance(value, str):  # YAML 1.1 takes 1e-3 for a string
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
    """ "FILE: " for a key, or for the nearest section around it."""
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


# ---------------------------------------------------------------- back to plain values; what was read
def to_dict(section: Section) -> dict:
    """Plain values of a section and all below it, ready for YAML; reading them does not count as reading."""
    stored = vars(section)
    out: dict[str, Any] = {"name": stored["name"]} if "name" in stored and "name" not in fields(type(section)) else {}
    for key in fields(type(section)):
        value = stored[key]
        if isinstance(value, list):
            out[key] = [to_dict(item) if isinstance(item, Section) else item for item in value]
        else:
            out[key] = to_dict(value) if isinstance(value, Section) else value
    return out


def dump(section: Section) -> str:
    """The section as YAML."""
    return yaml.safe_dump(to_dict(section), sort_keys=False, width=120, allow_unicode=True)


def sections(section: Section) -> list[Section]:
    """The section and all sections below it."""
    below = [item for key in fields(type(section)) for item in _items(vars(section)[key])]
    return [section] + [deep for value in below for deep in sections(value)]


def _items(value: Any) -> list[Section]:
    """The sections that a value is, or that a list holds."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Section)]


def unread(section: Section, prefix: str = "", like: Any = None) -> list[tuple[str, Any]]:
    """(dotted key, value) of every field that differs from its default and that no code has read. `like`: the section that stands there by default."""
    stored, out = vars(section), []
    defaults = (vars(like) if isinstance(like, type(section)) else {}) | stored.get("_defaults", {})
    for key, field in fields(type(section)).items():
        value, default = stored[key], defaults.get(key, _default(field))
        if _items(value):
            for n, item in enumerate(_items(value)):
                where = f"{prefix}{key}[{n}]." if isinstance(value, list) else f"{prefix}{key}."
                out += unread(item, where, None if isinstance(value, list) else default)
        elif key not in stored.get("_read", ()) and value not in (default, _default(field)):
            out.append((prefix + key, value))
    return out


def differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    """ "key: old → new" for every leaf that differs between two plain dictionaries."""
    out = []
    for key in list(a) + [k for k in b if k not in a]:
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            out += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            out.append(f"{prefix}{key}: {left!r} → {right!r}")
    return out


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
