"""The commands for trained models: `unlabeled eval`, `embed`, `harness`, `export`, `generate`, `snapshots` and `checkpoint …`,
one function for each (see `command_parser.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from common import output
from common.errors import UserError
from common.output import say
from eval.protocol_finder import protocols as all_protocols
from launch.argument_types import NO_FILE, ResultsFile, RunFolder
from launch.command_parser import HomePath

CheckpointPath = Annotated[str, "RUN/checkpoints/STEP, a URL, or a run folder, whose newest checkpoint is taken"]


def evaluate(
    model: Annotated[str, 'an exported folder (RUN/export/STEP), "pixels", "bytes" or "log_mel"'],
    protocols: Annotated[
        Sequence[str],
        "PROTOCOL|key=value",
        f"names of protocols ({', '.join(all_protocols())}; default: knn), and options such as knn.k=20",
    ] = (),
    *,
    out: ResultsFile = NO_FILE,
    dry_run: Annotated[bool, "print the time, the disk space and the memory that it needs, and write nothing"] = False,
) -> None:
    """Score a frozen model. For an export in a run folder the recipe names the data; otherwise write gallery=SHARDS
    query=SHARDS."""
    from launch.evaluate import evaluate

    evaluate(model, protocols, out, dry_run)


def compare(
    teacher: Annotated[str, "an exported folder, with which the others are compared"],
    protocols: Annotated[
        Sequence[str],
        "STUDENT|PROTOCOL|key=value",
        "exported folders, or a run folder for its last exports; names of protocols (default: knn) and options such as"
        " knn.k=20, as for `eval`",
    ],
    *,
    json: Annotated[HomePath, "FILE.json", "also write the numbers to this file"] = NO_FILE,
    html: Annotated[HomePath, "FILE.html", "also write the table and plots to this file"] = NO_FILE,
) -> None:
    """Compare a teacher and its students: scores by the same protocols, the share of the teacher's that they keep, CKA,
    size, latency and throughput."""
    from launch.compare import compare

    compare(teacher, protocols, json, html)


def embed(
    model: Annotated[str, 'an exported folder (RUN/export/STEP), "pixels", "bytes" or "log_mel"'],
    data: Annotated[HomePath, "shards, or a folder of images"],
    out: Annotated[HomePath, "folder to write; the same command continues if it was interrupted"],
    *,
    output: Annotated[
        Literal["auto", "cls", "mean", "patches"],
        "the class token, the mean of the patches or tokens, or all patches; auto: as the model is scored",
    ] = "auto",
    format: Annotated[
        Literal["npy", "parquet", "tar"],
        "npy writes arrays and their keys as .jsonl, parquet writes tables, tar writes shards",
    ] = "npy",
    image_size: Annotated[int | None, "PIXELS", "side of the images (default: that of the model)"] = None,
    device: Annotated[str, "NAME", "cpu, cuda, cuda:1, …; auto: the best one"] = "auto",
) -> None:
    """Write the features of all samples of a set, with their keys and in their order. Several processes that run this
    command at the same time share the work."""
    from eval.embed import embed
    from launch.evaluate import shards_of

    rows, left_out = embed(model, [shards_of(data)], Path(out), output, format, image_size, device)
    say(f"{out}: the features of {rows:,} samples; {left_out:,} samples that cannot be read have none")


def harness(
    model: Annotated[str, "an exported folder (RUN/export/STEP)"],
    tasks: Annotated[Sequence[str], "names of tasks"],
    *,
    include: Annotated[HomePath | None, "FOLDER", "folder with YAML files of your own tasks"] = None,
    shots: Annotated[int | None, "N", "number of examples before each question (default: as the task says)"] = None,
    limit: Annotated[int | None, "N", "score only the first N documents of each task (default: all)"] = None,
    batch: Annotated[int, "N", "number of texts in one batch"] = 16,
    no_bos: Annotated[bool, "do not put the BOS token before a context"] = False,
    out: ResultsFile = NO_FILE,
) -> None:
    """Score an exported decoder with lm-evaluation-harness."""
    from eval import results
    from eval.harness import evaluate
    from pretrain.run_folder.export_folders import run_of

    results.check_target(out)
    rows = evaluate(model, tasks, include, shots, limit, batch, not no_bos)
    values = (f"{row['value']:.4f}   ({row['count']:,} {row['unit']})" for row in rows)
    say(*output.columns([[r["model"], r["metric"], value] for r, value in zip(rows, values, strict=True)], [12, 40]))
    run = run_of(model)
    if target := out or (run and run / "results.jsonl"):
        results.append(Path(target), rows)


def export(
    run: RunFolder,
    target: Annotated[str | None, "folder to write (default RUN/export/STEP)"] = None,
    *,
    step: Annotated[int | None, "STEP", "step of the checkpoint (default: the newest)"] = None,
    also: Annotated[
        Sequence[str], "FORMAT", "further formats to write into the folder: timm, official, torch, onnx"
    ] = (),
) -> int:
    """Write the encoder of a checkpoint as config.json and model.safetensors, with a model card. Each further format is
    opened again, and its outputs are compared."""
    from pretrain.recipes.recipe import load

    recipe = load(run)  # before torch is imported, so that the error for a wrong folder appears at once
    from launch.export_checkpoint import export

    return export(Path(run), recipe, Path(target) if target else None, step, also)


def quantize(
    model: Annotated[str, "an exported folder (RUN/export/STEP)"],
    protocols: Annotated[
        Sequence[str], "PROTOCOL|key=value", "names of protocols (default: knn) and options, as for `eval`"
    ] = (),
    *,
    samples: Annotated[int, "N", "number of images of the query on which the losses of layers are computed"] = 32,
    reduce_range: Annotated[
        bool, "weights of 7 bits, for x86 processors without VNNI, whose int8 products can overflow"
    ] = False,
) -> None:
    """Write the encoder of an export with int8 weights, MODEL/model.int8.onnx, and compare it with the full one: scores,
    size, speed, and which layers lose most."""
    from launch.evaluate import request_for

    if samples < 1:
        raise UserError(f"--samples {samples}: write 1 or more")
    request = request_for(model, [word for word in protocols if "=" in word])
    if not request.query:
        raise UserError("no data are named; write gallery=SHARDS query=SHARDS")
    names = [word for word in protocols if "=" not in word] or ["knn"]
    from eval import int8_scores

    found = int8_scores.compare(
        Path(model),
        names,
        request.gallery,
        request.query,
        request.image_size,
        request.options,
        request.cache,
        samples,
        reduce_range,
    )
    say(*int8_scores.lines(found), f"{model}/model.int8.onnx")


def generate(
    model: Annotated[
        str, "a run folder (its newest export), an exported folder, or a folder of transformers with tokenizer.json"
    ],
    prompt: Annotated[str, "text to continue (default: the beginning of a document)"] = "",
    *,
    max_tokens: Annotated[int, "N", "largest number of tokens to write"] = 200,
    temperature: Annotated[float, "T", "temperature of the sampling; 0 always takes the likeliest token"] = 0.8,
    top_k: Annotated[int | None, "K", "sample from the K likeliest tokens only"] = None,
    top_p: Annotated[
        float | None, "P", "sample from the smallest set of tokens whose probabilities add up to P or more"
    ] = None,
    seed: Annotated[int, "N", "seed of the sampling (default 0)"] = 0,
    stop: Annotated[Sequence[str], "TEXT", "end before the first of these texts"] = (),
) -> None:
    """Continue a text with an exported language model. The text is printed while it is generated."""
    from eval import generate

    sampling = generate.Sampling(max_tokens, temperature, top_k, top_p, seed)
    for piece in generate.text(
        model, prompt, sampling, stop, lambda line: output.say(f"note: {line}", file=sys.stderr)
    ):
        output.write(piece)
    output.write("\n")


def snapshots(
    run: RunFolder,
    *,
    shards: Annotated[
        Sequence[HomePath], "SHARDS", "shards of the images to compare on (default: the run's data)"
    ] = (),
    images: Annotated[int, "N", "number of images"] = 64,
) -> None:
    """Compare the exports of a run as Gram teachers, by the quality of their patch similarities. No labels are
    needed."""
    from pretrain.recipes.recipe import stored

    data = stored(Path(run)).data
    from eval.gram_teachers import compare, table

    specs = list(shards) or data.train or [shard for source in data.mix for shard in source.shards]
    say(*table(compare(Path(run), specs, images), Path(run)).split("\n"))


def checkpoint_inspect(path: CheckpointPath) -> None:
    """Print the step, the recipe, the data, the versions and the tensors of a checkpoint."""
    from pretrain.checkpoint import tools

    say(*tools.inspect(path))


def checkpoint_verify(path: CheckpointPath) -> int:
    """Read all bytes of a checkpoint and compare them with the hashes that were stored when it was written."""
    from pretrain.checkpoint import tools

    problems = tools.verify(path)
    say(*problems or [f"{path}: every byte is as it was written"])
    return 1 if problems else 0


def checkpoint_consolidate(
    path: CheckpointPath,
    target: Annotated[str, "a .safetensors file, or a folder (default: the current folder)"] = ".",
) -> None:
    """Write the model of a checkpoint as one safetensors file, for any number of processes that have saved it."""
    from pretrain.checkpoint import tools

    say(f"{tools.consolidate(path, target)}: open it with safetensors.torch.load_file")
