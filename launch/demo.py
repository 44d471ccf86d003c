"""The quick start: download photographs, build shards, train a ViT without labels, compare its scores with those of raw
pixels and of the untrained network, and write a report."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import config, yaml_values
from common.errors import UserError
from common.output import say
from data_pipeline.build.build_shards import build
from data_pipeline.build.demo_images import fetch
from launch.local import train
from pretrain.recipes.recipe import Recipe, load
from pretrain.run_folder.jsonl_rows import read_rows

FOLDER = Path("runs/demo-data")
PROBE_STEPS, PROBE_LOG_EVERY = 12, 3  # `steps` and `log.every` of the short run that measures the speed of the machine
SPEED_WHILE_SCORING = (
    0.75  # speed of the training while a second process scores exports, relative to the measured speed
)
MIN_STEPS = 20  # number of steps on a machine that is too slow for the time limit


def demo(source: str = "auto", overrides: list[str] | None = None, minutes: float = 4.5) -> int:
    """Run the whole demo, in which the training takes at most about `minutes`. Returns the exit status of the
    training."""
    if not minutes > 0:
        raise UserError(f"--minutes {minutes:g}: write a number above 0")
    say(f"The demo trains for at most {minutes:g} minutes (--minutes); images, scores and report take about two more.")
    name = fetch(FOLDER / "images", source)
    shards = FOLDER / f"shards-{name}"
    for split in ("train", "val", "test"):
        if not (shards / split / "manifest.json").is_file():
            build(FOLDER / "images" / split, shards / split)
    both = f"[{shards / 'train'}, {shards / 'val'}]"
    words = [
        f"data.train={both}",  # the training does not use the labels
        f"eval.gallery={shards / 'train'}",
        f"eval.val={shards / 'val'}",
        f"eval.test_gallery={both}",
        f"eval.test={shards / 'test'}",
    ]
    given = overrides or []
    recipe = load("demo", [*words, *given])
    if not any(word.startswith("steps=") for word in given):
        recipe = load("demo", [*words, *_in_time(recipe, minutes * 60), *given])
    code = train(recipe)
    if code:
        return code
    from eval import report, results  # imports torch, which needs memory: not while the training runs

    run = Path(recipe.run)
    path = report.write(run)
    say("", *results.table(read_rows(run / "results.jsonl")).split("\n"), "", f"report: {path}")
    return 0


def _in_time(recipe: Recipe, seconds: float) -> list[str]:
    """Overrides that limit the training to about `seconds`.

    If the run exists already, they repeat its number of steps. Otherwise a short run measures the speed.
    """
    stored = Path(recipe.run) / "recipe.yaml"
    if stored.is_file() and not recipe.overwrite:
        steps = yaml_values.read_yaml(stored).get("steps")
        return [f"steps={steps}", *_every(steps, recipe.steps)] if isinstance(steps, int) else []
    began = time.monotonic()
    rate = _steps_per_second(recipe)
    rate *= SPEED_WHILE_SCORING
    steps = max(MIN_STEPS, int(rate * (seconds - (time.monotonic() - began))))
    minutes = recipe.steps / rate / 60  # for all steps of the recipe
    if steps >= recipe.steps:
        say(f"{recipe.steps} steps of {recipe.data.batch_size} images take about {minutes:.1f} minutes on this machine")
        return []
    say(
        f"{recipe.steps} steps would take about {minutes:.1f} minutes on this machine; to end after {seconds / 60:g}"
        f" minutes, the demo trains for {steps} steps, which gives lower scores"
    )
    return [f"steps={steps}", *_every(steps, recipe.steps)]


def _every(steps: int, recipe_steps: int) -> list[str]:
    """Overrides for a run of `steps` instead of `recipe_steps`: four exports and two checkpoints, as in the recipe.

    If the run has less than half of the steps, the machine is so slow that computing a score takes a minute or more;
    then only the first and the last export are written and scored.
    """
    if 2 * steps < recipe_steps:
        return [f"export={steps}", f"checkpoint={-(-steps // 2)}", "eval.val=[]"]
    return [f"export={-(-steps // 4)}", f"checkpoint={-(-steps // 2)}"]


def _steps_per_second(recipe: Recipe) -> float:
    """The speed of the training, measured by a run of a few steps without scores in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        values = config.to_dict(recipe) | {"run": f"{folder}/run", "steps": PROBE_STEPS, "overwrite": False, "eval": {}}
        values |= {"export": PROBE_STEPS, "checkpoint": PROBE_STEPS, "log": {"every": PROBE_LOG_EVERY, "flops": False}}
        values["optim"] = {key: value for key, value in values["optim"].items() if key not in ("lr", "weight_decay")}
        path = Path(folder, "probe.yaml")
        path.write_text(config.dump(values))
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pretrain.train", str(path)],
            env={"OMP_WAIT_POLICY": "passive", **os.environ},
            capture_output=True,
            text=True,
        )
        rows = [row for row in read_rows(Path(folder, "run", "metrics.jsonl")) if "samples_per_second" in row]
        if done.returncode or not rows:
            raise UserError(f"the run that measures the speed failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    rows = rows[len(rows) // 2 :]  # the first steps are slower
    return len(rows) / sum(recipe.data.batch_size / row["samples_per_second"] for row in rows)
