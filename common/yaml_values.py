"""The plain values of recipes: read from YAML files and from overrides, merged in layers, and compared.

A plain value is what YAML holds: a mapping, a list, a text, a number, true, false or null. Every error names the file
and what is wrong in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from common.errors import ConfigError

# For each dotted key, the file (or "command line") that set it, in the order in which the keys were set last.
Origin = dict[str, str]
MAX_YAML_VALUES = 100_000  # in one file; the recipes of the project have about a hundred


class _Loader(yaml.SafeLoader):
    """A YAML loader that raises an error for a key that is given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise yaml.constructor.ConstructorError(None, None, f"the key {name} is no name", key.start_mark)
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
        seen.add(name)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, source: str) -> Any:
    try:
        content = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date or number
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if (text := next((text for text in _texts(content) if not _is_unicode(text)), None)) is not None:
        raise ConfigError(
            f"{source}: holds a text with an unpaired surrogate ({text[:60]!r}), which is no valid Unicode; remove it"
        )
    if not _is_small(content):
        raise ConfigError(
            f"{source}: holds more than {MAX_YAML_VALUES} values, or one that holds itself; write it without aliases"
        )
    return content


def _texts(content: Any) -> Iterator[str]:
    """Every text in a YAML value, including keys. Each list and mapping is visited once, because a value may contain
    itself."""
    waiting, seen = [content], set[int]()
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict | list) and id(node) not in seen:
            seen.add(id(node))
            waiting += [*node, *node.values()] if isinstance(node, dict) else node


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: YAML's escapes can also express unpaired surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_small(content: Any) -> bool:
    """Whether a YAML value has at most MAX_YAML_VALUES parts, with every use of an alias counted."""
    waiting, count = [content], 0
    while waiting and count <= MAX_YAML_VALUES:
        node = waiting.pop()
        count += 1
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return count <= MAX_YAML_VALUES


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
    """Merge `new`, which comes from `source`, into `base` and `origin`, in place.

    `chosen`: the dotted keys of the sections whose class is chosen by `name`. If such a section gets another name, its
    old keys are dropped, because they belong to another class.
    """
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        if dotted in chosen and not isinstance(value, dict):
            value = {"name": value}
        if not isinstance(value, dict):
            origin.pop(dotted, None)
            base[key], origin[dotted] = value, source
            continue
        below = base.get(key)
        if not isinstance(below, dict):
            # A shorthand (`lr: 0.1`) is kept under the key "", which `build_config.build` replaces by the field's name.
            below = {} if below is None else {"": below}
        if dotted in chosen and value.get("name", below.get("name")) != below.get("name"):
            below = {}
        base[key] = below
        origin.pop(dotted, None)
        origin[dotted] = source
        merge(below, origin, value, source, chosen, dotted + ".")


def nest(key: str, value: Any) -> dict:
    """{"a": {"b": value}} from "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


# ---------------------------------------------------------------- walking over plain values
def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all leaves of plain values."""
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{key}[{name}]" if isinstance(value, list) else f"{key}.{name}".lstrip("."))
    else:
        yield key, value


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Plain values with `change` applied to every text."""
    if isinstance(value, dict):
        return {key: each_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [each_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def expand_home(text: str, what: str = "") -> str:
    """The path with its "~/" or "~user/" expanded, which a shell does not do in `data.train=~/shards`. Any other text
    is returned unchanged.

    Raises ConfigError that begins with `what` if the home folder is not known.
    """
    if not re.match(r"~$|~[^/\s]*/", text):
        return text
    out = os.path.expanduser(text)
    if out == text:
        raise ConfigError(f"{what}{text}: no home folder is known for {text.partition('/')[0]}; write the whole path")
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
