"""The command `eval`: parse the words of the command line into protocols and options, and score the model. An export
inside its run folder is evaluated on the data of the run's recipe, unless options name other data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import yaml_values
from common.errors import UserError
from common.output import say
from eval import results
from eval.protocol_finder import protocols
from eval.run import check
from eval.run import evaluate as score
from eval.tiers import tasks
from pretrain.recipes.recipe import expand_paths, stored
from pretrain.run_folder.export_folders import run_of


@dataclass
class Request:
    """What the command line asks for: the data, the device, and options of protocols."""

    gallery: list[str] = field(default_factory=list)  # shards on which a protocol fits its classifier
    query: list[str] = field(default_factory=list)  # shards on which it is scored
    image_size: int | None = None
    device: str = "auto"
    cache: str | None = None  # folder in which features are kept; None: the user's cache folder
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # {protocol: {option: value}}


def evaluate(model: str, words: Sequence[str], out: str, dry_run: bool = False) -> None:
    """Score a model, print the rows of results, and append them to a .jsonl file. `dry_run`: print what that will need
    instead.

    `words`: names of protocols (default knn), and options KEY=VALUE: gallery, query and image_size describe the data,
    `device` is the device that computes, `cache` is the folder in which features are kept, and PROTOCOL.OPTION is an
    option of a protocol. `out`: the file of the results; "" stands for results.jsonl of the run that the model belongs to, or no file if it belongs to no run.
    """
    names = [word for word in words if "=" not in word]
    check(names)
    results.check_target(out)
    request = request_for(model, [word for word in words if "=" in word])
    run = run_of(model)
    if dry_run:
        from eval.score_plan import plan

        request_of_plan = (request.image_size, request.options, request.device, request.cache)
        say(*plan(model, names or ["knn"], request.gallery, request.query, *request_of_plan))
        return
    # Without any option but device and cache, the result counts as the score of the run on its test split.
    changed = any("=" in word and not word.startswith(("device=", "cache=")) for word in words)
    split = "custom" if run is None or changed else "test"
    rows = score(
        model,
        names or ["knn"],
        request.gallery,
        request.query,
        split,
        request.image_size,
        request.options,
        request.device,
        request.cache,
    )
    say(*results.lines(rows))
    if target := out or (run and run / "results.jsonl"):
        results.append(Path(target), rows)


def request_for(model: str, options: Sequence[str]) -> Request:
    """What the options KEY=VALUE ask for, and otherwise the recipe of the run that a model belongs to. Folders of images
    are replaced by their shards."""
    request = Request()
    run = run_of(model)
    if run is not None:
        recipe = stored(run)
        cfg, task = recipe.eval, tasks(recipe).get("test")
        request = Request([], [], cfg.image_size, cfg.device, cfg.cache)
        if task is not None:
            request.gallery, request.query, request.options = task.gallery, task.query, task.option_values()
            request.device = task.device or cfg.device
    _apply(request, options)
    request.gallery, request.query = ([shards_of(spec) for spec in specs] for specs in (request.gallery, request.query))
    return request


def _apply(request: Request, overrides: Iterable[str]) -> None:
    """Set options KEY=VALUE in a request. Raises UserError for an unknown key, or a value of the wrong type."""
    for key, value in map(yaml_values.parse_override, overrides):
        value = expand_paths(value, "", key)
        protocol, _, option = key.partition(".")
        if option and protocol in protocols():
            *sections, last = option.split(".")
            target = request.options.setdefault(protocol, {})
            for section in sections:
                target = target.setdefault(section, {})
            target[last] = value
        elif key == "image_size":
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"image_size = {value!r}: write pixels, 1 or more")
            request.image_size = value
        elif key in ("device", "cache"):
            setattr(request, key, str(value))
        elif key in ("gallery", "query"):
            specs = value if isinstance(value, list) else [value]
            if not all(isinstance(spec, str) for spec in specs):
                raise UserError(f"{key} = {value!r}: write shards, as {key}=FOLDER or {key}=[FOLDER, FOLDER]")
            setattr(request, key, specs)
        else:
            raise UserError(
                f"{key!r}: no such option; write gallery=, query=, image_size=, device=, cache= or PROTOCOL.OPTION=, as in knn.k=20"
            )


def shards_of(spec: str) -> str:
    """`spec` if it names shards; if it is a folder of images, the folder of the shards that are built from it."""
    from data_pipeline.build import folder_cache

    return str(folder_cache.shards_of(spec)) if folder_cache.is_image_folder(spec) else spec
