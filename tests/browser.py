"""A headless Chromium that opens pages from disk, controlled by the Chrome DevTools Protocol over a pipe.

    with Browser() as browser:
        browser.open(path, width=390)
        browser.click(120, 80)
        assert browser.value("document.title") == "…"
        assert not browser.problems

`python -m tests.browser` installs it, from Debian's packages. `python -m tests.browser PAGE.html PICTURE.png` takes a
picture of the beginning of a page, as docs/demo_report.png.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.slurm import install_packages

PACKAGES = ("chromium",)
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
)
PICTURE = 1100, 1800  # width and height in pixels of a picture for the docs
READ, WRITE = 3, 4  # descriptors on which Chromium reads commands and writes answers and events


def missing() -> str:
    """Why no browser can be started here, or ""."""
    return (
        "" if shutil.which("chromium") else "chromium is not installed; on Debian, as root, `make browser` installs it"
    )


class Browser:
    """One tab. `problems`: exceptions, errors of the console, dialogs, and requests for anything but the page and data
    in it, since the last `open`."""

    def __enter__(self) -> Browser:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in os.pipe())
        self._read, answers = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in os.pipe())

        def connect() -> None:
            os.dup2(commands, READ)
            os.dup2(answers, WRITE)

        words = ["chromium", *OPTIONS, f"--user-data-dir={self._folder.name}", "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(
            words, preexec_fn=connect, pass_fds=(READ, WRITE), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, ""
        self.problems: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._folder.cleanup()

    def open(self, page: Path, width: int, height: int = 900, touch: bool = False) -> None:
        """Load a page in a window of this size, in pixels, and wait until it has loaded."""
        self.problems, self._loaded, self._url = [], False, page.resolve().as_uri()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Emulation.setTouchEmulationEnabled", enabled=touch)
        self._call("Page.navigate", url=self._url)
        while not self._loaded:
            self._receive()

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression. Raises AssertionError with its exception."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, x: float, y: float) -> None:
        """Press and release the mouse at a place in the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, x: float, y: float) -> None:
        """The same with a finger."""
        self._call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self._call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str) -> None:
        """Press and release a key, such as ArrowLeft."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, target: Path, whole: bool = True) -> None:
        """Write the whole page, or what the window shows of it, as a PNG."""
        found = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        target.write_bytes(base64.b64decode(found["data"]))

    def _call(self, method: str, **values: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": values}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        """The next message of the browser. Events are noted."""
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        values = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Log.entryAdded" if values["entry"]["level"] == "error":
                self.problems.append(f"log: {json.dumps(values)[:500]}")
            case "Runtime.exceptionThrown" | "Page.javascriptDialogOpening":
                self.problems.append(f"{message['method']}: {json.dumps(values)[:500]}")
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "warning", "assert"):
                self.problems.append(f"console: {json.dumps(values['args'])[:500]}")
            case "Network.requestWillBeSent":
                url = values["request"]["url"]
                if url != self._url and not url.startswith("data:"):
                    self.problems.append(f"request: {url[:500]}")
        return message


if __name__ == "__main__":
    if len(sys.argv) == 3:
        with Browser() as browser:
            browser.open(Path(sys.argv[1]), *PICTURE)
            browser.screenshot(Path(sys.argv[2]), whole=False)
        sys.exit()
    if missing():
        install_packages(PACKAGES, "tests of reports in a browser")
    if reason := missing():
        print(f"tests of reports in a browser will be SKIPPED: {reason}", flush=True)
