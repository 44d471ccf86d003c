"""The command `compare`: score a teacher and its students by the same protocols, and print, store or draw what they
keep, how large and how fast they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.output import say
from data_pipeline.storage.urls import write_atomically
from eval.protocol_finder import protocols
from launch.argument_types import check_file
from launch.evaluate import request_for
from pretrain.run_folder.export_folders import exports, run_of, student_exports


def compare(teacher: str, words: Sequence[str], json_file: str, html_file: str) -> None:
    """`words`: students, names of protocols (default: knn), and options KEY=VALUE as for `unlabeled eval`. A run folder
    stands for the last exports of its students. Without data in the options, those of a run's recipe are used: of the
    run of the first student that belongs to one, or of the teacher's."""
    check_file("--json", json_file, ".json")
    check_file("--html", html_file, ".html")
    names = [word for word in words if word in protocols()]
    others = [one for word in words if "=" not in word and word not in names for one in _exports_of(word)]
    if not others:
        raise UserError(
            "no students are named; write their exported folders after the teacher: compare TEACHER STUDENT …"
        )
    models = [*_exports_of(teacher)[:1], *others]
    source = next((model for model in [*others, models[0]] if run_of(model) is not None), models[0])
    request = request_for(source, [word for word in words if "=" in word])
    if not request.query:
        raise UserError("no data are named; write gallery=SHARDS query=SHARDS")
    from eval import model_comparison
    from pretrain.parallel.device import pick_device

    device = str(pick_device(request.device, key="device"))

    found = model_comparison.compare(
        models,
        names or ["knn"],
        request.gallery,
        request.query,
        request.image_size,
        request.options,
        device,
        request.cache,
    )
    say(*model_comparison.table(found))
    if json_file:
        values = model_comparison.as_json(found, request.gallery, request.query, device)
        write_atomically(json_file, [(json.dumps(values, indent=1) + "\n").encode()])
    if html_file:
        about = f"Scored on {', '.join(request.query)}, gallery {', '.join(request.gallery) or '–'}; {device}."
        say(model_comparison.write_page(found, Path(html_file), about))


def _exports_of(word: str) -> list[str]:
    """The last export of each student, if `word` is a run folder; otherwise `word` itself."""
    if not (Path(word) / "recipe.yaml").is_file():
        return [word]
    found = [exports(Path(word)), *student_exports(Path(word)).values()]
    last = [str(folders[max(folders)]) for folders in found if folders]
    if not last:
        raise UserError(f"{word}: has no export yet; train it first: unlabeled train {word}")
    return last
