"""Trackio, which needs no account. Without a server the run is stored in FOLDER; `TRACKIO_DIR=FOLDER trackio show`
shows it, and several runs may have the same folder. `server` is the URL of a Trackio server, with its token in
TRACKIO_WRITE_TOKEN, or a Space of Hugging Face such as `me/runs`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

PACKAGES = ("trackio",)


class Run:
    """A run of Trackio, which finds it by its name in its project."""

    def __init__(self, options: Any, folder: Path, known: str, settings: dict[str, Any]):
        os.environ["TRACKIO_DIR"] = str(folder)
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            os.environ.pop(name, None)
        if not options.server:
            os.environ["HF_HUB_OFFLINE"] = "1"  # it would ask Hugging Face for the user's name
        import trackio

        place = {"server_url" if "://" in options.server else "space_id": options.server} if options.server else {}
        self.run = trackio.init(
            options.project,
            name=options.run,
            resume="must" if known else "never",
            config={key: str(value) for key, value in settings.items()},
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
            **place,
        )
        self.id = self.run.id
        if known and self.id != known:
            raise ValueError(
                f"the project {options.project} has another run {options.run} that is newer; give this one another name"
                " with `run` in log.trackers"
            )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()
