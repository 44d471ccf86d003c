"""The table of all commands of `unlabeled`, and the functions of the commands that start, plan and describe runs.

A command is one function, whose signature defines its arguments (see `command_parser.py`). Each function imports what
it needs when it runs, so that help and errors of the command line are printed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from common import output
from common.output import say
from launch import cluster_commands, model_commands, shard_commands
from launch.argument_types import NO_FILE, Overrides, RecipeName, check_file
from launch.command_parser import Commands, HomePath


def train(
    recipe: RecipeName,
    overrides: Overrides = (),
    *,
    processes: Annotated[
        int, "N", "number of processes on this machine; more than one needs a parallel.mode for several processes"
    ] = 1,
) -> int:
    """Train a recipe. A run that was stopped continues from its newest checkpoint."""
    from pretrain import signals

    signals.end_at_once()  # until the training processes have started
    from pretrain.recipes.recipe import load

    resolved = load(recipe, overrides)  # before numpy is imported, so that the error for a wrong key appears at once
    from launch.local import provide, train

    provide(resolved)
    return train(resolved, processes)


def plan(
    recipe: RecipeName,
    overrides: Overrides = (),
    *,
    device: Annotated[str, "NAME", "device for the estimate of the time, such as h100 or a100"] = "h100",
    mfu: Annotated[float, "SHARE", "share of the device's peak FLOP/s that the run is expected to reach"] = 0.4,
    processes: Annotated[int, "N", "number of processes, one for each device"] = 1,
) -> None:
    """Estimate a run before it starts: parameters, FLOPs, hours, and the memory and traffic of each process. This
    allocates no tensors and reads no data."""
    from pretrain.recipes.recipe import load

    cfg = load(recipe, overrides)
    from pretrain.estimate import plan

    say(*plan.describe(cfg, device, mfu, processes))


def report(
    runs: Annotated[Sequence[str], "RUN", "a run folder, or several that are compared on one page"],
    *,
    out: Annotated[
        HomePath, "FILE.html", "the page to write (default: RUN/report.html, and comparison.html for several runs)"
    ] = NO_FILE,
) -> None:
    """Write the report of a run, or a page that compares several runs: one HTML file that loads nothing else."""
    check_file("--out", out, ".html")
    if len(runs) > 1:
        from eval import report_comparison

        say(report_comparison.write([Path(run) for run in runs], Path(out or "comparison.html")))
    else:
        from eval.report import write

        say(write(Path(runs[0]), Path(out) if out else None))


def recipes() -> None:
    """List the recipes and the objectives. `recipes show NAME` prints a recipe with the meaning of each key."""
    from pretrain.objectives import finder
    from pretrain.recipes import recipe

    for name, purpose in recipe.names().items():
        say(f"{name:<24}{purpose}")
    say("", "objectives")
    for name in finder.names():
        say(f"{name:<24}{finder.purpose(name)}")


def recipes_show(recipe: RecipeName, overrides: Overrides = ()) -> None:
    """Print a resolved recipe as YAML with the meaning of each key. `unlabeled train FILE` accepts the output."""
    from pretrain.recipes.recipe import load

    resolved = load(recipe, overrides)
    from launch.show_recipe import lines

    say(*lines(resolved, recipe))


def check(
    objective: Annotated[str, "the path of an objective's file, or the name of an objective of the project"],
    overrides: Overrides = (),
) -> int:
    """Check that an objective meets the contract between objectives and the training loop, with tiny models on random
    data."""
    from pretrain import contract

    failed = 0
    for title, problems in contract.check(objective, overrides):
        say(f"{'fails' if problems else 'ok':<6}{title}", *(f"      {problem}" for problem in problems))
        failed += bool(problems)
    say(f"{objective}: {f'{failed} of these checks failed' if failed else 'all checks passed'}")
    return 1 if failed else 0


def completion(shell: Annotated[Literal["bash", "zsh"], "the shell"]) -> None:
    """Print shell code that completes commands, recipes and their keys. Add eval "$(unlabeled completion bash)" to
    ~/.bashrc, or eval "$(unlabeled completion zsh)" to ~/.zshrc."""
    from launch.completion import script

    output.write(script())


def doctor() -> int:
    """List the packages that are installed and those that are missing, with the command that installs them."""
    from launch.doctor import report

    return report()


def demo(
    overrides: Overrides = (),
    *,
    source: Annotated[
        Literal["auto", "materials", "digits"],
        "the images; auto takes photographs of materials, or digits if they cannot be downloaded",
    ] = "auto",
    minutes: Annotated[float, "N", "time limit of the training; a slow machine trains for fewer steps"] = 4.5,
) -> int:
    """Download real photographs, pretrain a model on them without labels, score it, and write a report."""
    from launch.demo import demo

    return demo(source, overrides, minutes)


def demo_text(
    target: Annotated[str, "folder for the token shards"] = "runs/demo-text",
    *,
    source: Annotated[
        Literal["auto", "speeches", "stdlib"],
        "the text; auto takes the State of the Union addresses, or Python's standard library if they cannot be"
        " downloaded",
    ] = "auto",
    vocab: Annotated[int, "N", "size of the vocabulary of the tokenizer"] = 4096,
) -> None:
    """Download real text, train a tokenizer on it, and write token shards to TARGET/train, TARGET/val and
    TARGET/test."""
    from data_pipeline.build.demo_text import make

    make(Path(target), source, vocab)


COMMANDS: Commands = {
    "train": train,
    "launch": cluster_commands.launch,
    "status": cluster_commands.status,
    "logs": cluster_commands.logs,
    "stop": cluster_commands.stop,
    "eval": model_commands.evaluate,
    "compare": model_commands.compare,
    "embed": model_commands.embed,
    "report": report,
    "export": model_commands.export,
    "quantize": model_commands.quantize,
    "generate": model_commands.generate,
    "recipes": ("", {"": recipes, "show": recipes_show}),
    "plan": plan,
    "check": check,
    "doctor": doctor,
    "completion": completion,
    "demo": demo,
    "demo-text": demo_text,
    "shards": (
        "Build, index, check, describe and split WebDataset shards.",
        {
            "build": shard_commands.build,
            "index": shard_commands.index,
            "verify": shard_commands.verify,
            "stats": shard_commands.stats,
            "split": shard_commands.split,
            "preview": shard_commands.preview,
            "tokenizer": shard_commands.tokenizer,
            "tokenize": shard_commands.tokenize,
        },
    ),
    "checkpoint": (
        "Describe, check or convert a checkpoint.",
        {
            "inspect": model_commands.checkpoint_inspect,
            "verify": model_commands.checkpoint_verify,
            "consolidate": model_commands.checkpoint_consolidate,
        },
    ),
    "harness": model_commands.harness,
    "snapshots": model_commands.snapshots,
}
