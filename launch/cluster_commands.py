"""The commands of `unlabeled` for runs on a cluster: launch, status, logs and stop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from common.output import say, write
from launch.argument_types import Overrides, RecipeName, RunFolder


def launch(
    recipe: RecipeName = "",
    overrides: Overrides = (),
    *,
    on: Annotated[
        str, "CLUSTER", "a cluster of ~/.config/unlabeled/clusters.yaml (default: the only one there), or kubernetes"
    ] = "",
    nodes: Annotated[
        str | None, "N", "number of nodes, or a range such as 2-4: the job uses as many of them as it can get"
    ] = None,
    gpus: Annotated[int | None, "N", "number of GPUs on each node; 0: train on CPUs"] = None,
    processes: Annotated[int | None, "N", "number of processes on each node (default: one per GPU, else one)"] = None,
    cpus: Annotated[int | None, "N", "number of cores for each process"] = None,
    memory_gb: Annotated[float | None, "GB", "memory of each node"] = None,
    hours: Annotated[float | None, "N", "time limit; a job that reaches it is requeued and continues the run"] = None,
    signal_delay: Annotated[
        int | None, "SECONDS", "time before the limit at which the run saves a checkpoint and requeues its job"
    ] = None,
    max_restarts: Annotated[
        int | None, "N", "number of restarts in a row, without a trained step between them, after which the job ends"
    ] = None,
    partition: Annotated[str | None, "NAME", "partition"] = None,
    qos: Annotated[str | None, "NAME", "quality of service"] = None,
    account: Annotated[str | None, "NAME", "account to which the time is charged"] = None,
    constraint: Annotated[str | None, "FEATURES", "features that nodes must have"] = None,
    reservation: Annotated[str | None, "NAME", "reservation"] = None,
    exclude: Annotated[str | None, "NODES", "nodes not to use, such as n[1-3],n7"] = None,
    evaluation: Annotated[
        str | None, "CLUSTER", "profile for the jobs that evaluate exports (default: beside the training)"
    ] = None,
    array: Annotated[
        Sequence[str],
        "KEY=VALUE,VALUE",
        "start a run for each value, for example seed=0,1,2; with several keys, for each combination of values",
    ] = (),
    at_a_time: Annotated[int, "N", "number of jobs of an array that may run at the same time (default: all)"] = 0,
    dry_run: Annotated[bool, "print the batch script, or the manifest, and submit nothing"] = False,
    init: Annotated[bool, "write a profile of this machine's cluster from the output of sinfo"] = False,
) -> int:
    """Train a recipe as a job on a Slurm cluster. Options replace those of the cluster's profile."""
    from common.errors import UserError
    from launch import clusters

    if init:
        say(clusters.write_profile())
        return 0
    if not recipe:
        raise UserError("name a recipe: unlabeled launch RECIPE key=value … --on CLUSTER (or --init for a profile)")
    given = {
        **{"nodes": nodes, "gpus": gpus, "processes": processes, "cpus": cpus, "memory_gb": memory_gb, "hours": hours},
        **{"signal_delay": signal_delay, "max_restarts": max_restarts, "partition": partition, "qos": qos},
        **{"account": account, "constraint": constraint, "reservation": reservation, "exclude": exclude},
        "evaluation": evaluation,
    }
    from launch import manifests, slurm

    if on == manifests.NAME:
        if not dry_run:
            raise UserError(
                f"--on {on}: write --dry-run > job.yaml, which prints the manifest, and kubectl apply -f job.yaml"
            )
        profile = manifests.profile(given)
        write("---\n".join(manifests.text(one, profile) for one in slurm.recipes(recipe, overrides, array)))
        return 0
    cluster = clusters.find(on, **given)
    runs = slurm.recipes(recipe, overrides, array)
    lines = slurm.script(runs, cluster, at_a_time).splitlines() if dry_run else slurm.submit(runs, cluster, at_a_time)
    say(*lines)
    return 0


def status(
    folders: Annotated[
        Sequence[str], "FOLDER", "run folders, folders of runs, or URLs of checkpoints (default: runs)"
    ] = ("runs",),
    *,
    watch: Annotated[bool, "show it again every few seconds"] = False,
    seconds: Annotated[float, "SECONDS", "with --watch, the time between two updates"] = 5.0,
) -> None:
    """Show the state of runs: queue, steps, remaining time, speed, last checkpoint, last score, restarts, evaluation
    jobs. Of a URL it shows the newest checkpoint there."""
    from common.output import clear_screen
    from launch.status import runs_in, table

    say(*table(runs_in(folders)))
    while watch:
        time.sleep(seconds)
        lines = table(runs_in(folders))
        clear_screen()
        say(time.strftime("%H:%M:%S"), *lines)


def logs(
    run: RunFolder,
    *,
    rank: Annotated[int | None, "N", "the log of this rank of a job (default: the log of the run)"] = None,
    lines: Annotated[int, "N", "number of lines from the end"] = 50,
    follow: Annotated[bool, "also print new lines until the run has ended"] = False,
) -> None:
    """Show the end of a run's log."""
    from launch import status
    from launch.file_tails import tail

    path = status.log_of(Path(run), rank)
    say(*tail(path, lines))
    if follow:
        status.follow(path, Path(run), say)


def stop(
    run: RunFolder,
    *,
    now: Annotated[bool, "stop it at once, without a checkpoint, and cancel its evaluation jobs"] = False,
) -> None:
    """Stop a run after a checkpoint, on a cluster or on this machine. The command that started the run resumes it."""
    from launch.status import stop

    say(stop(Path(run), now))
