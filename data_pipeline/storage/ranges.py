"""Read byte ranges from any store, with retries, time limits and hedged requests (a second request when the first is
slow), all of which are counted.

There are two back ends: `obstore` for s3, gs and az if it is installed (`pip install 'unlabeled[obstore]'`), and fsspec
for every other store. Requests of both are retried here, with exponential back-off and full jitter, for
`retry_seconds`. Permanent errors, such as a missing file or refused credentials, are raised at once. If fewer bytes
come than requested, the request is repeated; after MAX_SHORT_READS attempts these bytes are returned, and the hash of
the sample then shows that it is damaged.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from common.errors import DataError, is_bug
from common.untrusted import open_regular
from data_pipeline.storage.urls import is_local, open_store

READ_ATTEMPTS = 10  # attempts to read bytes whose hash is wrong
MAX_SHORT_READS = 3  # attempts after which a range that is too short is returned
OPEN_FILES = 128  # local files that are kept open at a time
# errors of network file systems that go away after a while
TRANSIENT_ERRNOS = (
    errno.EIO,
    errno.ESTALE,
    errno.EAGAIN,
    errno.ETIMEDOUT,
    errno.EINTR,
)
# exceptions and error codes of stores that refuse the credentials
_CREDENTIAL_ERRORS = (
    "PermissionDenied",
    "Unauthenticated",
    "NoCredentials",
    "PartialCredentials",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
)
CREDENTIAL_HINTS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    **dict.fromkeys(("http", "https"), "`machine HOST login USER password PASSWORD` in ~/.netrc"),
}


class MissingFile(DataError):
    """Raised for a file that does not exist."""


class RangeReader:
    """Reads byte ranges of files. Thread-safe. Counts bytes, requests, retries, hedged requests and short answers."""

    def __init__(self, inflight: int = 16, attempt_seconds: float = 30.0, retry_seconds: float = 600.0):
        self.attempt_seconds, self.retry_seconds = attempt_seconds, retry_seconds
        self.counts: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._durations: deque[float] = deque(maxlen=200)  # seconds of the last requests
        self._inflight = inflight
        self._pool: ThreadPoolExecutor | None = None
        self._files: OrderedDict[str, int] = OrderedDict()
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[type[RangeReader], tuple[int, float, float]]:
        return RangeReader, (self._inflight, self.attempt_seconds, self.retry_seconds)  # without connections and files

    def range(self, url: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file.

        Raises DataError when the file does not exist, access is refused, or no answer comes in `retry_seconds`.
        """
        if end <= start:
            return b""
        if is_local(url):
            return self._local(url, start, end)
        short_reads = 0

        def attempt() -> bytes:
            nonlocal short_reads
            data = self._attempt(url, start, end)
            if len(data) > end - start:
                raise DataError(
                    f"{url}: the server sends {len(data)} bytes where {end - start} are requested: it does not support"
                    " byte ranges; copy the shards to a server that does"
                )
            if len(data) < end - start:
                self._count(short=1)
                short_reads += 1
                if short_reads < MAX_SHORT_READS:
                    raise OSError(f"the store returned only {len(data)} of {end - start} bytes")
            return data

        data = with_retries(url, attempt, self.retry_seconds, lambda: self._count(retries=1), bounded=True)
        self._count(bytes=len(data))
        return data

    def _attempt(self, url: str, start: int, end: int) -> bytes:
        """Send one request, and a second one if the first takes longer than nearly all earlier ones; return the first
        answer.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(2 * self._inflight, "fetch")
        read = backend(url)
        start_time = time.monotonic()
        requests: list[Future] = [self._pool.submit(self._timed, read, start, end)]
        limit = self.attempt_seconds + (end - start) / 1e6  # a slow connection is assumed to give 1 MB/s
        hedge_after = self._hedge_after()
        waiting = set(requests)
        while waiting:
            left = limit - (time.monotonic() - start_time)
            done, waiting = wait(waiting, min(hedge_after, max(left, 0)), FIRST_COMPLETED)
            for request in done:
                if request.exception() is None or not waiting:  # an answer, or the failure of the last request
                    return request.result()
            if time.monotonic() - start_time >= limit:
                for request in waiting:
                    request.cancel()
                raise TimeoutError(f"no answer in {limit:.0f} seconds")
            if not done and len(requests) == 1 and self._may_hedge():
                requests.append(self._pool.submit(self._timed, read, start, end))
                waiting.add(requests[-1])
                self._count(hedges=1)
            hedge_after = limit
        raise OSError("no answer")

    def _timed(self, read: Callable[[int, int], bytes], start: int, end: int) -> bytes:
        self._count(requests=1)
        start_time = time.monotonic()
        data = read(start, end)
        with self._lock:
            self._durations.append(time.monotonic() - start_time)
        return data

    def _hedge_after(self) -> float:
        """Seconds after which a request is hedged: 1.5 times the 99th percentile of the durations of the last requests.
        Before 20 requests have been answered, it is the time limit of a request."""
        with self._lock:
            durations = sorted(self._durations)
        if len(durations) < 20:
            return float(self.attempt_seconds)
        return max(0.05, 1.5 * durations[int(len(durations) * 0.99)])

    def _may_hedge(self) -> bool:
        """Whether one more request may be hedged: at most one in twenty, so that a slow store does not get slower."""
        with self._lock:
            return self.counts["hedges"] < 2 + self.counts["requests"] // 20

    def new_counts(self) -> Counter[str]:
        """The counts since the last call."""
        with self._lock:
            new, self._reported = self.counts - self._reported, self.counts.copy()
        return new

    def _count(self, **changes: int) -> None:
        with self._lock:
            self.counts.update(changes)

    def _local(self, url: str, start: int, end: int) -> bytes:
        path = url.removeprefix("file://").removeprefix("local://")
        with self._lock:
            if self._pid != os.getpid():  # after a fork, this process must open the files again
                self._files, self._pid = OrderedDict(), os.getpid()
            file = self._files.pop(path, None) or OpenFile(path)
            self._files[path] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
            self.counts["requests"] += 1
            self.counts["bytes"] += end - start
        if not 0 <= start < file.size:  # the offset comes from an index, which may be wrong
            return b""
        try:
            return os.pread(file.number, min(end, file.size) - start, start)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None


class OpenFile:
    """An open local file, closed when the last reference to it is gone."""

    def __init__(self, path: str):
        try:
            self.number = open_regular(path)
            self.size = os.fstat(self.number).st_size
        except FileNotFoundError:
            raise MissingFile(f"{path}: no such file") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Heartbeat:
    """The time of the last progress of a call: a long transfer calls `now` after each piece."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def now(self) -> None:
        self.last = time.monotonic()


def with_retries(
    url: str,
    call: Callable[[], Any],
    seconds: float = 60.0,
    retrying: Callable[[], None] = lambda: None,
    beat: Heartbeat | None = None,
    bounded: bool = False,
) -> Any:
    """Return the result of `call`, which is repeated while it fails. Raises DataError after `seconds` of failures, and
    at once for a permanent error.

    A call to a store that does not answer is abandoned after `seconds` without a `beat`. `bounded`: whether `call` has
    a time limit already, so that this one is not needed. `retrying` is called before each repetition.
    """
    deadline, tries = time.monotonic() + seconds, 0
    while True:
        try:
            return call() if bounded or is_local(url) else _call_with_timeout(seconds, call, beat or Heartbeat())
        except DataError:
            raise
        except Exception as error:  # the exceptions of OSError, botocore, aiohttp and obstore have no common base
            if is_bug(error):
                raise
            _raise_if_permanent(url, error)
            tries += 1
            if time.monotonic() >= deadline:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise DataError(
                    f"{url}: no answer in {seconds:.0f} seconds and {tries} tries; the last error: {reason}"
                ) from None
        retrying()
        # full jitter, so that many clients do not repeat their requests at the same time
        time.sleep(random.uniform(0, min(10.0, 0.1 * 2 ** min(tries, 10))))


def _call_with_timeout(seconds: float, call: Callable[[], Any], beat: Heartbeat) -> Any:
    """Run `call` in a thread and return its result or raise its error.

    The thread is abandoned after `seconds` without a `beat`.
    """
    found: list[Any] = [None, None]  # result, error
    done = threading.Event()

    def run() -> None:
        try:
            found[0] = call()
        except BaseException as error:
            found[1] = error
        done.set()

    beat.now()
    threading.Thread(target=run, daemon=True).start()
    while not done.wait(max(0.0, beat.last + seconds - time.monotonic())):
        if time.monotonic() >= beat.last + seconds:
            raise TimeoutError("the store does not answer")
    if found[1] is not None:
        raise found[1]
    return found[0]


def _raise_if_permanent(url: str, error: Exception) -> None:
    """Raises DataError for an error that a retry cannot correct."""
    text = " ".join(str(error).split())
    scheme = url.partition("://")[0]
    kind = type(error).__name__
    if isinstance(error, FileNotFoundError | NotADirectoryError) or kind == "NotFoundError":
        raise MissingFile(f"{url}: no such file") from None
    if is_local(url) and isinstance(error, OSError) and error.errno not in TRANSIENT_ERRNOS:
        raise DataError(f"{url}: cannot be read ({error.strerror or error})") from None
    denied = getattr(error, "status", None) in (401, 403)  # of an aiohttp error
    if isinstance(error, PermissionError) or denied or any(word in kind + text for word in _CREDENTIAL_ERRORS):
        where = CREDENTIAL_HINTS.get(scheme, "the environment variables of this store")
        raise DataError(f"{url}: the store refuses these credentials ({kind}); set {where}") from None


# ---------------------------------------------------------------- back ends
_backends: dict[tuple[int, str], Any] = {}


def backend(url: str) -> Callable[[int, int], bytes]:
    """A function read(start, end) that sends one request for bytes of a remote file."""
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme in ("s3", "gs", "az"):
        store = _obstore(scheme, bucket)
        if store is not None:
            import obstore

            return lambda start, end: bytes(obstore.get_range(store, path, start=start, end=end))
    fs, fs_path = open_store(url)
    return lambda start, end: fs.cat_file(fs_path, start=start, end=end)


def _obstore(scheme: str, bucket: str) -> Any:
    """The obstore store of a bucket, one per process; None if obstore is not installed."""
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
