"""Trackio, which needs no account. Without a server the run is stored in FOLDER; `TRACKIO_DIR=FOLDER trackio show`
shows it, and several runs may have the same folder. `server` is the URL of a Trackio server, with its token in
TRACKIO_WRITE_TOKEN, or a Space of Hugging Face such as `me/runs`, which is created as a private one."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from pretrain.trackers.trackers import UnknownRun

PACKAGES = ("trackio",)


class Run:
    """A run of Trackio, which finds it by its name in its project."""

    def __init__(self, options: Any, folder: Path, run_id: str):
        os.environ["TRACKIO_DIR"] = str(folder)
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            os.environ.pop(name, None)
        if not options.server:
            os.environ["HF_HUB_OFFLINE"] = "1"  # it would ask Hugging Face for the user's name
        import trackio

        place: dict[str, Any] = {}
        if options.server:
            place = {"server_url": options.server} if "://" in options.server else {"space_id": options.server}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.run = trackio.init(
                    options.project,
                    name=options.run,
                    resume="must" if run_id else "never",
                    private=True,
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                    **place,
                )
            except ValueError as error:
                # It also says so if the server does not answer, but then warns. A run exists once a row of it is
                # stored, which is later than its id is known.
                if not run_id or "does not exist" not in str(error) or caught:
                    raise
                raise UnknownRun(str(error)) from None
        self.id = self.run.id
        if run_id and self.id != run_id:
            raise ValueError(
                f"the project {options.project} has another run {options.run} that is newer; give this one another name"
                " with `run` in log.trackers"
            )

    def add_settings(self, settings: dict[str, Any]) -> None:
        self.run.config |= {key: str(value) for key, value in settings.items()}  # sent with the first row

    def log(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        for step, values in rows:
            self.run.log(values, step=step)

    def close(self, outcome: str) -> None:
        self.run.finish()
