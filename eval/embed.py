"""Features of all samples of a set as files, for search, clustering and models of the user's own: `unlabeled embed`.

The folder OUT holds one file of features for each part, which is a number of consecutive samples:

    part-00000.npy          float32 [n, D], or [n, P, D] for patches
    part-00000.jsonl        {"shard": …, "key": …} of each row. It is written after the features are on the disk
    part-00000.parquet      in place of both: the columns shard, key and features (a fixed-size list of D or P·D floats)
    part-00000.tar          in place of both: a shard with a member SHARD/KEY.features.npy for each row
    _part-00000.damaged     the numbers of damaged samples in the part, if there are any
    _embed.json             what was embedded: model, data, output, the shape of a row, samples in a part

Rows have the order of the shards. Damaged samples, and samples without an image or a text, have no row. An interrupted
command continues with the parts that are missing, and processes that embed the same set into one folder share them. A
part is written again if a sample that was damaged can be read now.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from common.errors import Damaged, DataError, UserError
from common.progress import Progress
from data_pipeline.shards.samples import Samples
from eval.feature_cache import Source, any_readable, is_damaged, read_batches
from eval.feature_files import errors_about, remembered, share_work, write_whole
from eval.features import open_encoder

ABOUT = "_embed.json"  # readers of parquet folders ignore files that begin with "_" or "."
OUTPUTS = ("cls", "mean", "patches")
ENDINGS = {"npy": ".jsonl", "parquet": ".parquet", "tar": ".tar"}  # {format: ending of the file that is written last}
MEMBER = "features.npy"  # the ending of a sample's features in a shard
PART_BYTES = 64 * 2**20  # of the features of a part, which are in memory until it is written
PART_SAMPLES = 1 << 14  # at most, in a part


def embed(
    model: str,
    data: Sequence[str],
    out: Path,
    output: str = "auto",
    format: str = "npy",
    image_size: int | None = None,
    device: str = "auto",
) -> tuple[int, int]:
    """Write the features of all samples to a folder. Returns (rows, samples that were left out).

    `model`: an exported folder, "pixels", "bytes" or "log_mel". `output`: the class token ("cls"), the mean of the patches or
    tokens ("mean"), "patches", or that by which the model is scored ("auto"). `format`: "npy", "parquet" or "tar". Raises
    UserError for a folder that holds something else.
    """
    if format not in ENDINGS:
        raise UserError(f"--format {format}: write npy, parquet or tar")
    if format == "parquet":
        _pyarrow()
    encoder, _ = open_encoder(model, image_size, device)
    samples = encoder.check(data)
    if output != "patches":
        encoder.pool = encoder.pool if output == "auto" else output
    elif encoder.unit not in ("images", "clips"):
        raise UserError(
            f"--output patches: {model} reads {encoder.unit}, whose numbers of tokens differ; write cls or mean"
        )
    shape = _features(encoder, [encoder.stand_in()], output).shape[1:]
    identity = f"{samples.id} {encoder.fingerprint(samples)}".encode()
    part = max(1, min(PART_SAMPLES, PART_BYTES // (4 * int(np.prod(shape)))))  # samples
    about: dict[str, Any] = {
        "id": xxhash.xxh3_128_hexdigest(identity),  # of model, preparation and data
        "model": model,
        "data": list(data),
        "output": output if output == "patches" else encoder.pool,
        "format": format,
        "shape": list(shape),
        "samples": len(samples),
        "part": part,
    }
    with errors_about(out, "name another folder for the features"):
        _begin(out, about)
    names = [f"part-{n:05d}" for n in range(-(-len(samples) // part))]
    read = partial(_read, encoder, samples)

    @remembered
    def is_done(name: str) -> bool:
        if not (out / f"{name}{ENDINGS[format]}").is_file():
            return False
        damaged = out / f"_{name}.damaged"
        return not damaged.is_file() or not any_readable(read, json.loads(damaged.read_text()))

    done = sum(is_done(name) for name in names)
    progress = Progress("embed", len(names), done)

    def work(name: str) -> None:
        first = int(name.removeprefix("part-")) * part
        numbers = range(first, min(len(samples), first + part))
        _write_part(encoder, samples, numbers, out / name, output, format, shape)
        nonlocal done
        done += 1
        progress.update(done, "parts")

    share_work(out, names, is_done, work)
    progress.close()
    rows = sum(_rows(out / f"{name}{ENDINGS[format]}") for name in names)
    return rows, len(samples) - rows


def _begin(out: Path, about: dict[str, Any]) -> None:
    """Make the folder, unless it is there with the same contents. Raises UserError for another one."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / ABOUT).is_file():
        foreign = sorted(path.name for path in out.iterdir() if ABOUT not in path.name)
        if foreign and not (out / ABOUT).is_file():  # another process has not begun in the meantime
            raise UserError(f"{out}: holds {foreign[0]}, which is no file of `unlabeled embed`; name a new folder")
        write_whole(out / ABOUT, json.dumps(about, indent=2).encode() + b"\n")
    found = json.loads((out / ABOUT).read_text())
    described = ("id", "output", "format", "shape", "samples", "part")  # paths of model and data may change
    if differing := [key for key in described if found.get(key) != about[key]]:
        differences = ", ".join(f"{key} {found.get(key)}, not {about[key]}" for key in differing if key != "id")
        differences = differences or "another model, image size or other data"
        raise UserError(f"{out}: holds features of {differences}; name a new folder")


def _read(encoder: Source, samples: Samples, number: int) -> tuple[Any, tuple[str, str]] | Damaged:
    """(prepared sample, (shard, key)), or why it cannot be used."""
    try:
        return encoder.read(samples, number), samples.name(number)
    except Damaged as reason:
        return reason


def _write_part(
    encoder: Source,
    samples: Samples,
    numbers: Sequence[int],
    path: Path,
    output: str,
    format: str,
    shape: tuple[int, ...],
) -> None:
    """Write the features and the keys of consecutive samples."""
    keys: list[tuple[str, str]] = []  # (shard, key)
    damaged: list[int] = []
    parts = [np.zeros((0, *shape), np.float32)]
    for of_batch, found in read_batches(partial(_read, encoder, samples), numbers, encoder.batch):
        damaged += [number for number, one in zip(of_batch, found, strict=True) if is_damaged(one)]
        usable = [one for one in found if not isinstance(one, Damaged)]
        if usable:
            parts.append(_features(encoder, [one for one, _ in usable], output))
            keys += [(_printable(shard.rpartition("/")[2]), _printable(key)) for _, (shard, key) in usable]
    features = np.concatenate(parts)  # [n, …]
    if len(keys) and not np.isfinite(features).all():
        count = int((~np.isfinite(features.reshape(len(features), -1)).all(1)).sum())
        raise DataError(f"{encoder.name}: its features of {count} of {len(keys)} {encoder.unit} are not finite")
    list_of_damaged = path.with_name(f"_{path.name}.damaged")
    with errors_about(path.parent, "name a folder on a larger disk; the same command there starts anew"):
        path.with_suffix(ENDINGS[format]).unlink(missing_ok=True)  # of an earlier command, with fewer samples
        list_of_damaged.unlink(missing_ok=True)
        if damaged:
            write_whole(list_of_damaged, json.dumps(damaged).encode())
        if format == "parquet":
            write_whole(path.with_suffix(".parquet"), _parquet(features, keys))
            return
        if format == "tar":
            write_whole(path.with_suffix(".tar"), _shard(features, keys))
            return
        write_whole(path.with_suffix(".npy"), _npy(features))
        lines = (json.dumps({"shard": shard, "key": key}, ensure_ascii=False) + "\n" for shard, key in keys)
        write_whole(path.with_suffix(".jsonl"), "".join(lines).encode())


def _features(encoder: Source, inputs: list[Any], output: str) -> np.ndarray:
    """fp32 [B, D], or patches [B, P, D], of samples that `encoder.read` has prepared."""
    if output == "patches":
        return encoder(np.stack(inputs)).tokens.float().cpu().numpy()  # type: ignore[operator]
    return encoder.pooled(inputs).numpy()


def _printable(name: str) -> str:
    """A name whose bytes are not UTF-8, with escapes in their place."""
    return name.encode(errors="backslashreplace").decode()


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError("pyarrow is not installed; pip install 'unlabeled[parquet]', or write --format npy") from None
    return pyarrow


def _npy(array: np.ndarray) -> memoryview:
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getbuffer()


def _shard(features: np.ndarray, keys: list[tuple[str, str]]) -> memoryview:
    """The bytes of a tar whose samples have one member each. Keys are those of one shard, so its name is in front."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for (shard, key), row in zip(keys, features, strict=True):
            data = _npy(row)
            info = tarfile.TarInfo(f"{shard.removesuffix('.tar')}/{key}.{MEMBER}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getbuffer()


def _parquet(features: np.ndarray, keys: list[tuple[str, str]]) -> memoryview:
    """The bytes of a parquet file."""
    pa = _pyarrow()
    from pyarrow import parquet

    flat = features.reshape(len(features), -1)
    columns = {
        "shard": pa.array([shard for shard, _ in keys], pa.string()),
        "key": pa.array([key for _, key in keys], pa.string()),
        "features": pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel(), pa.float32()), flat.shape[1]),
    }
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getbuffer()


def _rows(path: Path) -> int:
    """The number of rows of a part, from the file that is written last."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return sum(1 for _ in file)
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            return len(tar.getmembers())
    from pyarrow import parquet

    return parquet.read_metadata(path).num_rows
