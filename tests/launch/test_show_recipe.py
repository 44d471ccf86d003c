"""`unlabeled recipes show`: every key with its meaning, in a file that trains in the same way."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import Section, fields, to_dict
from common.explain import explanations
from common.schedules import Schedule
from launch.show_recipe import lines
from pretrain.models import presets
from pretrain.objectives import finder
from pretrain.recipes.recipe import Recipe, load, names
from tests.conftest import sampled, unlabeled


def sections() -> Iterator[type[Section]]:
    """Every class of options: those of the sections of Recipe, and those of all objectives and models."""
    waiting: list[type[Section]] = [Recipe, *(cls for cls, _ in presets.PRESETS.values())]
    waiting += [finder.config_class(name)[0] for name in finder.names()]
    seen: list[type[Section]] = []
    while waiting:
        cls = waiting.pop()
        if cls in seen or not hasattr(cls, "__dataclass_fields__"):
            continue
        seen.append(cls)
        yield cls
        waiting += [part for hint in typing.get_type_hints(cls).values() for part in below(hint)]


def below(hint: object) -> list[type[Section]]:
    """The section classes that a type names."""
    parts = (hint, *typing.get_args(hint))
    return [part for part in parts if isinstance(part, type) and issubclass(part, Section)]


def test_every_option_has_an_explanation():
    without = []
    for cls in sections():
        hints = typing.get_type_hints(cls)
        for key, text in explanations(cls).items():
            (section, *_) = [*below(hints[key]), None]
            documented = section not in (None, Section, Schedule) and not section.__doc__.startswith(section.__name__)
            if not text and not documented:
                without.append(f"{cls.__module__}.{cls.__name__}.{key}")
    assert not without, f"write a comment at {', '.join(without)}"


def test_comments_are_found_wherever_they_stand(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom common.config import option\nfrom pretrain.objectives.options import MultiCrop, Options\n\n"
        "# of no field\n@dataclass\nclass Config(MultiCrop):\n    a: int = 1  # behind it\n    # above it\n    # in two lines\n    b: int = option(2, low=1)\n"
        "    c: str = (\n        'x # y'\n    )  # at its end  # type: ignore\n    d: int = 4\n    blur: float = 1.0\n"
    )
    told = explanations(finder.config_class(str(path))[0])
    assert [told[key] for key in "abcd"] == ["behind it", "above it in two lines", "at its end", ""]
    assert told["blur"] == explanations(finder.config_class("dinov2")[0])["blur"] != ""


SHOWN = ("demo", "dinov3_vit7b16_gram", "gpt_dial", "clip_vitb16", "vjepa2_vitl16", "bestrq_cpu", "t5_base")


@pytest.mark.parametrize("name", sampled(names(), *SHOWN, others=pytest.mark.slow))
def test_what_is_shown_is_the_recipe(name: str, tmp_path: Path):
    shown = tmp_path / "mine.yaml"
    overrides = ["data.mix=[{shards: a, weight: 1}, {shards: b}]", "data.phases=[{step: 5}]"]
    overrides.append('eval.prompts=["two\\nlines", "a: # b"]')
    text = lines(load(name, overrides), name)
    shown.write_text("\n".join(text))
    assert to_dict(load(shown)) == to_dict(load(name, overrides))
    assert all(len(line) <= 120 for line in text if line.lstrip().startswith("#"))


def test_the_command_shows_overrides_and_own_objectives(tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text(Path("pretrain/objectives/mae.py").read_text())
    done = unlabeled("recipes", "show", "mae_vits16", f"objective={mine}", "objective.mask_ratio=0.6")
    assert done.returncode == 0, done.stderr
    assert (
        "  mask_ratio: 0.6  # share of the patches that the encoder does not see [above 0 and below 1]\n" in done.stdout
    )
    assert all(f"\n{key}: " in done.stdout or f"\n{key}:\n" in done.stdout for key in fields(Recipe) if key != "steps")
    wrong = unlabeled("recipes", "show", "mae_vits16", "objective.mask=0.6")
    assert wrong.returncode == 2 and "no such key; did you mean mask_ratio" in wrong.stderr
