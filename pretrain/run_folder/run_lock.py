"""The lock of a run folder, RUN/.run.lock. It lists the processes that train the run, by host and process id, and
prevents a second trainer from writing to the same folder.

The launcher takes the lock, and its trainer joins it. A holder on the same machine counts as ended if no process has
its process id and start time. For holders on other machines, the modification time of the lock decides: every holder
renews it regularly, and a lock that nobody renews is stale. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.output import say
from common.untrusted import loads, schema_error
from pretrain.run_folder.written_files import LOCK

LOCK_TOKEN_VARIABLE = "UNLABELED_LOCK"  # environment variable: token of the launcher's lock, which its trainers join
LAUNCHER_VARIABLE = "UNLABELED_LAUNCHER"  # environment variable: process id of the launcher; trainers end when it ends
RENEWAL_SECONDS = 5.0  # time between two renewals by a holder
STALE_SECONDS = 30.0  # a lock of another machine is stale after this time without a renewal
WRITING_SECONDS = 1.0  # after this time, invalid content counts as that of a process that crashed while writing
Holder = dict[str, Any]  # {"host", "machine", "pid", "started", "since"}
LockContent = dict[str, Any]  # {"token": str, "holders": list[Holder]}
HOLDER_SCHEMA = {"host": str, "machine": str, "pid": int, "started": str, "since": str}


class Lock:
    """The lock, as one process holds it: call `take` before anything in the run folder is changed, and `release` at the
    end. Only rank 0 of a run takes the lock."""

    def __init__(self) -> None:
        self.token = os.environ.get(LOCK_TOKEN_VARIABLE) or uuid.uuid4().hex
        self.run: Path | None = None  # None while the lock is not taken
        self.taken_over = False  # whether a trainer on another machine has replaced this lock by its own
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._own_entry: Holder = {}

    def take(self, run: Path) -> None:
        """Take the lock of a run folder, or join it if it has the same token. Raises UserError, which names the host
        and the process id, if another trainer holds it."""
        path = run / LOCK
        self._own_entry = {"host": socket.gethostname(), "machine": machine_id(), "pid": os.getpid()}
        self._own_entry |= {"started": process_start(os.getpid()), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            while not self._create(path):
                content = _read(path)
                if content is None:
                    continue  # released in the meantime
                if content["token"] == self.token:
                    _write(path, {**content, "holders": [*content["holders"], self._own_entry]})
                    break
                if (holder := _living_holder(path, content)) is not None:
                    raise UserError(
                        f"{run}: is in use by process {holder['pid']} on {holder['host']} since {holder['since']};"
                        f" wait until it has ended, or run `kill {holder['pid']}` on that host, after which it writes a"
                        " checkpoint and ends, or choose another folder with run=FOLDER"
                    )
                _delete_stale(path, content)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror or error}); choose a folder with write permission with"
                " run=FOLDER"
            ) from None
        self.run = run
        self._thread = threading.Thread(target=self._renew, args=(path,), name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise UserError if another trainer has taken over the folder because this process did not renew the lock in
        time."""
        if self.taken_over:
            raise UserError(
                f"{self.run}: another trainer has taken over this folder, because this trainer did not renew its lock"
                f" for {STALE_SECONDS:g} s; this trainer ends"
            )

    def release(self) -> None:
        """Remove this process from the holders of the lock; the last holder deletes the file. Does nothing if the lock
        is not taken."""
        if self.run is None:
            return
        path, self.run = self.run / LOCK, None
        self._end.set()
        # If a signal handler raised an exception while `take` started the thread, the thread is not alive for Python
        # and cannot be joined; it ends because `_end` is set.
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()
        # If the folder has been deleted or become read-only, the lock remains, and becomes stale.
        with contextlib.suppress(OSError):
            content = _read(path)
            if content is not None and content["token"] == self.token:
                others = content["holders"]
                if self._own_entry in others:
                    others.remove(self._own_entry)
                if others:
                    _write(path, {**content, "holders": others})
                else:
                    path.unlink()

    def _create(self, path: Path) -> bool:
        """Create the lock together with its content in one atomic operation, so that no process reads incomplete
        content. Returns False if a lock exists already."""
        temporary = path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
        try:
            temporary.write_text(json.dumps({"token": self.token, "holders": [self._own_entry]}))
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                return _create_exclusively(path, temporary.read_bytes())
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _renew(self, path: Path) -> None:
        """Renew the modification time of the lock until `release` is called. Runs in a thread."""
        while not self._end.wait(RENEWAL_SECONDS):
            with contextlib.suppress(OSError):
                content = _read(path)
                if content is not None and content["token"] != self.token:
                    self.taken_over = True
                    return
                os.utime(path)


# ---------------------------------------------------------------- the file
def _read(path: Path) -> LockContent | None:
    """The content of a lock; None if there is no lock. A lock whose content is invalid, because a process crashed while
    writing it, counts as a lock without holders."""
    for _ in range(10):
        try:
            content = loads(path.read_text())
            if not schema_error(content, {"token": str, "holders": [object]}):
                return {"token": content["token"], "holders": [h for h in content["holders"] if _is_holder(h)]}
        except FileNotFoundError:
            return None
        except ValueError:
            pass
        time.sleep(WRITING_SECONDS / 10)  # another process may be writing it at the moment
    return {"token": "", "holders": []}


def _is_holder(value: Any) -> bool:
    return not schema_error(value, HOLDER_SCHEMA) and 0 < value["pid"] < 1 << 31


def _write(path: Path, content: LockContent) -> None:
    temporary = path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def _create_exclusively(path: Path, content: bytes = b"") -> bool:
    """Create a file with this content. Returns False if it exists already."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, content)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)
    return True


def living_holder(run: Path) -> Holder | None:
    """A process that trains the run at present, for commands that report the state of a run; None if there is none.
    This function does not wait: a process on another machine counts as running if the lock was renewed less than
    STALE_SECONDS ago, according to this machine's clock."""
    path = run / LOCK
    content = _read(path)
    for holder in content["holders"] if content else ():
        with contextlib.suppress(OSError):
            renewed = time.time() - path.stat().st_mtime < STALE_SECONDS
            if is_alive(holder) if holder["machine"] == machine_id() else renewed:
                return holder
    return None


# ---------------------------------------------------------------- stale locks
def _living_holder(path: Path, content: LockContent) -> Holder | None:
    """A holder that is still running; None if all have ended. May wait STALE_SECONDS for a renewal by another
    machine."""
    here = machine_id()
    for holder in content["holders"]:
        if holder["machine"] == here and is_alive(holder):
            return holder
    elsewhere = [holder for holder in content["holders"] if holder["machine"] != here]
    return elsewhere[0] if elsewhere and _is_renewed(path) else None


def _is_renewed(path: Path) -> bool:
    """Wait up to STALE_SECONDS for a renewal of a lock, and return whether it was renewed. The file is opened again
    each time, because that makes a network file system fetch the current modification time. Two values of the
    modification time are compared, so that the clocks of different machines need not agree."""
    first_mtime, deadline = None, time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        try:
            with path.open() as file:
                mtime = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return False
        if first_mtime is not None and mtime != first_mtime:
            return True
        first_mtime = mtime
        time.sleep(min(0.5, RENEWAL_SECONDS / 4))
    return False


def _delete_stale(path: Path, content: LockContent) -> None:
    """Delete a stale lock if its content is still `content`. A process that wants to delete it first creates a claim
    file, whose name is a hash of this content. Only one process can hold the claim, so that no process deletes a new
    lock which another process has created in the meantime."""
    claim = path.with_name(f"{LOCK}.{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]}")
    deadline = time.monotonic() + STALE_SECONDS
    while not _create_exclusively(claim):
        if _read(path) != content:
            return
        if time.monotonic() > deadline:
            claim.unlink(missing_ok=True)  # the process that created the claim died before it deleted the lock
            return
        time.sleep(0.01)
    try:
        if _read(path) == content:
            path.unlink()
    finally:
        claim.unlink(missing_ok=True)


# ---------------------------------------------------------------- processes
def machine_id() -> str:
    """An identifier of the machine: host name, boot id and PID namespace. It is equal in two processes if, and only if,
    they can see each other's process ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def process_start(pid: int) -> str:
    """The start time of a process on this machine, in clock ticks since the boot; "" if it cannot be read, or if the
    process has ended."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
    return ""


def is_alive(holder: Holder) -> bool:
    """Whether a holder on this machine is still running. Its start time distinguishes it from a later process that got
    the same process id."""
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user, whose start time may be hidden
        return process_start(holder["pid"]) in ("", holder["started"])
    return process_start(holder["pid"]) == holder["started"]


def end_with_launcher() -> None:
    """Send SIGTERM to this process when the launcher that started it has ended without ending its trainers, for example
    by kill -9."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if not launcher:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(0.5)
        say(f"error: the launcher, process {launcher}, has ended; this trainer ends, too", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
