"""Byte ranges from any store, with patience: retries, deadlines, a second request where the first is slow, and counts of it all.

Two back ends: `obstore` for s3, gs and az where it is installed (`pip install 'unlabeled[obstore]'`), fsspec for everything else. The retry
around both is ours, as neither knows what a lost range costs: back-off with full jitter until `retry_seconds` are over. What cannot become
better by waiting is not tried again: a missing file, a refused key. A range that comes back short is asked for again, then given as it is:
the sample's hash says whether it is whole.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from data_pipeline.storage import DataError, is_local, open_store

SHORT_TRIES = 3  # of a range that comes back too short, before it is given as it is
OPEN_FILES = 128
_DENIED = (
    "PermissionDenied",
    "Unauthenticated",
    "NoCredentials",
    "PartialCredentials",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
)
WHERE = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


class Missing(DataError):
    """A file that is not there."""


class Fetcher:
    """Reads byte ranges; safe to call from many threads. Counts bytes, requests, retries, hedges, short answers."""

    def __init__(self, inflight: int = 16, attempt_seconds: float = 30.0, retry_seconds: float = 600.0):
        self.attempt_seconds, self.retry_seconds = attempt_seconds, retry_seconds
        self.counts: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._took: deque[float] = deque(maxlen=200)  # seconds of the last requests
        self._inflight = inflight
        self._pool: ThreadPoolExecutor | None = None
        self._files: OrderedDict[str, int] = OrderedDict()
        self._pid = os.getpid()

    def range(self, url: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file. Raises DataError: no such file, no right to it, or no answer in `retry_seconds`."""
        if end <= start:
            return b""
        if is_local(url):
            return self._local(url, start, end)
        shorts = 0

        def attempt() -> bytes:
            nonlocal shorts
            data = self._attempt(url, start, end)
            if len(data) > end - start:
                raise DataError(
                    f"{url}: the server sends {len(data)} bytes where {end - start} are asked for: it knows no ranges; copy the shards to one that does"
                )
            if len(data) < end - start:
                self._count(short=1)
                shorts += 1
                if shorts < SHORT_TRIES:
                    raise OSError(f"{len(data)} of {end - start} bytes came")
            return data

        data = patiently(url, attempt, self.retry_seconds, lambda: self._count(retries=1))
        self._count(bytes=len(data))
        return data

    def _attempt(self, url: str, start: int, end: int) -> bytes:
        """One request, and a second one beside it where the first takes longer than nearly all before; what comes first counts."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(2 * self._inflight, "fetch")
        read = backend(url)
        began = time.monotonic()
        requests: list[Future] = [self._pool.submit(self._timed, read, start, end)]
        limit = self.attempt_seconds + (end - start) / 1e6  # a slow line still brings 1 MB/s
        patience = self._patience()
        waiting = set(requests)
        while waiting:
            left = limit - (time.monotonic() - began)
            done, waiting = wait(waiting, min(patience, max(left, 0)), FIRST_COMPLETED)
            for request in done:
                if request.exception() is None or not waiting:
                    return request.result()
            if time.monotonic() - began >= limit:
                for request in waiting:
                    request.cancel()
                raise TimeoutError(f"no answer in {limit:.0f} seconds")
            if not done and len(requests) == 1 and self._may_hedge():
                requests.append(self._pool.submit(self._timed, read, start, end))
                waiting.add(requests[-1])
                self._count(hedges=1)
            patience = limit
        raise OSError("no answer")

    def _timed(self, read: Callable[[int, int], bytes], start: int, end: int) -> bytes:
        self._count(requests=1)
        began = time.monotonic()
        data = read(start, end)
        with self._lock:
            self._took.append(time.monotonic() - began)
        return data

    def _patience(self) -> float:
        """The 99th percentile of the last requests, seconds; no hedging before there are 20."""
        with self._lock:
            took = sorted(self._took)
        return max(0.05, 1.5 * took[int(len(took) * 0.99)]) if len(took) >= 20 else float(self.attempt_seconds)

    def _may_hedge(self) -> bool:
        """At most one request in twenty is doubled, so that a slow store is not made slower."""
        with self._lock:
            return self.counts["hedges"] < 2 + self.counts["requests"] // 20

    def new_counts(self) -> Counter[str]:
        """What was counted since the last call."""
        with self._lock:
            new, self._told = self.counts - self._told, self.counts.copy()
        return new

    def _count(self, **changes: int) -> None:
        with self._lock:
            self.counts.update(changes)

    def _local(self, url: str, start: int, end: int) -> bytes:
        path = url.removeprefix("file://").removeprefix("local://")
        with self._lock:
            if self._pid != os.getpid():  # after a fork: the parent goes on with its own
                self._files, self._pid = OrderedDict(), os.getpid()
            file = self._files.pop(path, None) or _File(path)
            self._files[path] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
            self.counts["requests"] += 1
            self.counts["bytes"] += end - start
        return os.pread(file.number, end - start, start)


class _File:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, path: str):
        try:
            self.number = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise Missing(f"{path}: no such file") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def patiently(
    url: str, call: Callable[[], Any], seconds: float = 60.0, retrying: Callable[[], None] = lambda: None
) -> Any:
    """What `call` gives, called again while it fails, until `seconds` are over. Raises DataError then, and at once for what stays wrong."""
    deadline, tries = time.monotonic() + seconds, 0
    while True:
        try:
            return call()
        except DataError:
            raise
        except Exception as error:  # stores raise everything: OSError, botocore's, aiohttp's, obstore's
            _raise_if_final(url, error)
            tries += 1
            if time.monotonic() >= deadline:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise DataError(
                    f"{url}: no answer in {seconds:.0f} seconds and {tries} tries; the last: {reason}"
                ) from None
        retrying()
        time.sleep(
            random.uniform(0, min(10.0, 0.1 * 2 ** min(tries, 10)))
        )  # full jitter: clients do not come back together


def _raise_if_final(url: str, error: Exception) -> None:
    """A DataError for what no retry will mend."""
    text = " ".join(str(error).split())
    scheme = url.partition("://")[0]
    kind = type(error).__name__
    if isinstance(error, FileNotFoundError) or kind == "NotFoundError":
        raise Missing(f"{url}: no such file") from None
    if isinstance(error, PermissionError) or any(word in kind + text for word in _DENIED):
        where = WHERE.get(scheme, "the store's own variables")
        raise DataError(f"{url}: the store refuses these credentials ({kind}); set {where}") from None


# ---------------------------------------------------------------- back ends
_backends: dict[tuple[int, str], Any] = {}


def backend(url: str) -> Callable[[int, int], bytes]:
    """read(start, end) of a remote file."""
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme in ("s3", "gs", "az"):
        store = _obstore(scheme, bucket)
        if store is not None:
            import obstore

            return lambda start, end: bytes(obstore.get_range(store, path, start=start, end=end))
    fs, inside = open_store(url)
    return lambda start, end: fs.cat_file(inside, start=start, end=end)


def _obstore(scheme: str, bucket: str) -> Any:
    """A store of obstore, one per process and bucket; None where obstore is not installed."""
    key = (os.getpid(), f"{scheme}://{bucket}")
    if key not in _backends:
        try:
            from obstore.store import from_url
        except ImportError:
            _backends[key] = None
            return None
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options: dict[str, Any] = {"client_options": {"timeout": "30s", "connect_timeout": "5s"}}
        if scheme == "s3" and endpoint:
            options |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
            options["client_options"]["allow_http"] = endpoint.startswith("http://")
        _backends[key] = from_url(key[1], retry_config={"max_retries": 0}, **options)
    return _backends[key]
