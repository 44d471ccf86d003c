"""Weights & Biases. Without a server the run is recorded offline; `wandb sync FOLDER/wandb/offline-run-*` sends it
later. With `server: https://api.wandb.ai`, or the URL of your own server, it is sent while it trains; the key is taken
from WANDB_API_KEY or `wandb login`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from pretrain.trackers.trackers import FINISHED, STOPPED

PACKAGES = ("wandb",)


class Run:
    """A run of W&B. The x-axis of its charts is `step`, since W&B's own counter of steps cannot go back, as it would
    have to for scores."""

    def __init__(self, options: Any, folder: Path, run_id: str):
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        if wandb.run is not None:  # that has failed; its folder, which is named after the second, must not be reused
            time.sleep(1.0)
        self.run = wandb.init(
            project=options.project,
            name=options.run,
            id=run_id or None,
            resume="allow" if options.server else None,
            reinit="finish_previous",  # after an error; by default wandb would return the run that has failed
            dir=str(folder),
            mode="online" if options.server else "offline",
            settings=wandb.Settings(
                **{"base_url": options.server} if options.server else {},
                **{"console": "off", "silent": True, "save_code": False, "disable_git": True},
                **{"x_disable_meta": True, "x_disable_stats": True, "x_save_requirements": False},
            ),
        )
        self.id = self.run.id
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def add_settings(self, settings: dict[str, Any]) -> None:
        self.run.config.update(settings, allow_val_change=True)

    def log(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        for step, values in rows:
            self.run.log({**values, "step": step})

    def close(self, outcome: str) -> None:
        if outcome == STOPPED:
            self.run.mark_preempting()  # W&B then shows it as preempted, not as failed
        self.run.finish(exit_code=0 if outcome == FINISHED else 1)
