"""The lengths of recordings in seconds, measured without decoding them, for batches by budget.

`unlabeled shards build` and `unlabeled shards index` write them beside the index: `seconds-ID.bin` has a float32 for
each sample, in the order of the index. The lengths of other shards are measured when a run needs them, and kept in the
cache folder. A sample without a recording, or with a damaged one, has length 0.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common import output, process_pool
from common.errors import Damaged, DataError
from common.progress import Progress
from data_pipeline.formats.av_files import need_av
from data_pipeline.formats.waveforms import seconds_of
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.members import AUDIO
from data_pipeline.storage.ranges import MissingFile, with_retries
from data_pipeline.storage.urls import cache_folder, exclusive, open_store, write_atomically

DTYPE = np.dtype("<f4")
SAMPLES_AT_ONCE = 64  # that a thread measures in one call


def file_name(manifest: Manifest) -> str:
    """The name of the file beside the index of a shard set."""
    return f"seconds-{manifest.id[:12]}.bin"


def write(samples: Any, say: Callable[[str], None] = output.say) -> None:
    """Measure the recordings of a folder of shards (`Samples` of this folder alone), and write the file beside its index.
    Nothing is written if it holds no recordings, or without PyAV."""
    manifest = samples.manifests[0].manifest
    if not {*AUDIO} & {*manifest.extensions}:
        return
    try:
        need_av()
    except DataError as problem:
        return say(f"{manifest.folder}: the lengths of its recordings are not measured: {problem}")
    fs, path = open_store(manifest.folder)
    for other in fs.glob(path + "/seconds-" + "[0-9a-f]" * 12 + ".bin"):
        fs.rm_file(other)
    write_atomically(f"{manifest.folder}/{file_name(manifest)}", [_measure(samples).tobytes()])


def durations_of(samples: Any) -> np.ndarray:
    """The lengths of all recordings of a dataset (`Samples`), in seconds: float32 [N]. Raises DataError if none of its
    samples has one."""
    stored = [_stored(indexed) for indexed in samples.manifests]
    if all(part is not None for part in stored):
        out = np.concatenate([part for part in stored if part is not None])
    else:
        cache = cache_folder("durations")
        file = cache / f"{samples.id}.bin"
        with exclusive(cache / f".{samples.id}.lock"):  # one process of a machine measures them
            out = _read_cached(file, len(samples))
            if out is None:
                output.say(
                    f"{samples.names}: measuring the lengths of {len(samples)} recordings, once; `unlabeled shards index"
                    " FOLDER` stores them beside the index"
                )
                out = _measure(samples)
                write_atomically(str(file), [out.tobytes()])
    if not (out > 0).any():
        raise DataError(f"{samples.names}: holds no recording whose length can be measured")
    return out


def _parsed(data: bytes, count: int) -> np.ndarray | None:
    """The content of a file with the lengths of `count` samples; None if it is damaged."""
    values = np.frombuffer(data[: len(data) // DTYPE.itemsize * DTYPE.itemsize], DTYPE)
    valid = len(data) == count * DTYPE.itemsize and bool(np.isfinite(values).all() and (values >= 0).all())
    return values if valid else None


def _stored(indexed: Any) -> np.ndarray | None:
    """The lengths of the samples of an `IndexedManifest` from the file beside its index; None if there is none."""
    manifest = indexed.manifest
    if not manifest.folder:
        return None
    url = f"{manifest.folder}/{file_name(manifest)}"
    fs, path = open_store(url)
    try:
        values = _parsed(with_retries(url, lambda: fs.cat_file(path)), manifest.samples)
    except MissingFile:
        return None
    if values is None:
        raise DataError(f"{url}: is damaged; run `unlabeled shards index {manifest.folder}` again")
    first = np.concatenate([[0], np.cumsum(manifest.counts)])
    return np.concatenate([values[first[row] : first[row + 1]] for row in indexed.rows])


def _read_cached(file: Path, count: int) -> np.ndarray | None:
    return _parsed(file.read_bytes(), count) if file.is_file() else None


def _measure(samples: Any) -> np.ndarray:
    out, progress = np.zeros(len(samples), DTYPE), Progress("lengths", len(samples))

    def measure(first: int) -> int:
        end = min(len(samples), first + SAMPLES_AT_ONCE)
        for number in range(first, end):
            try:
                out[number] = next(map(seconds_of, samples.read(number, AUDIO).values()), 0.0)
            except Damaged:
                out[number] = 0.0
        return end - first

    done = 0
    with ThreadPoolExecutor(process_pool.cores()) as pool:
        for count in pool.map(measure, range(0, len(samples), SAMPLES_AT_ONCE)):
            done += count
            progress.update(done)
    progress.close()
    return out
