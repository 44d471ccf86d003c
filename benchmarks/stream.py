"""The cost of reading samples from shards for the trainer, compared with webdataset, streaming (MosaicML) and litdata
on the same JPEGs.

    stream.raw.cpu_versus_X    CPU seconds per sample of all processes, with one data worker, until the trainer has the
                               encoded bytes: ours / X. Our samples are fully shuffled, and every hash is verified;
                               those of X are in file order and not verified
    stream.raw.wall_versus_X   the same for wall time
    stream.s3_30ms.rate_versus_webdataset   samples per second from a real S3 server that waits 30 ms before each answer,
                                            ours / webdataset's single stream
    stream.s3_30ms_23MBps...                the same with at most 23 MB/s per connection
    stream.shuffle.chi2_per_dof             randomness of the order for 1.28 million samples that are sorted by class,
                                            with batches of 4,096 and 33 thousand samples in memory; 1 is ideal
    stream.start_seconds.METHOD             seconds from the first `next` of a stream in a trainer that has imported
                                            torch to the first batch of two workers, by `data.start_method`; the
                                            server of forkserver runs already, as in a run

CPU time per sample is computed from the difference between long and short runs, so that the start does not count. Runs
alternate, and figures are medians over rounds. streaming and litdata need an older numpy than ours: name a Python with
these packages in --peers (python -m venv; pip install mosaicml-streaming litdata webdataset torch). Without it, only
webdataset is compared.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

COUNT, SHARDS, BATCH = 8192, 16, 64  # COUNT: number of samples
SERVER_SECONDS = 20.0  # for the server of forkserver to import what workers need; a run builds its model meanwhile


# ---------------------------------------------------------------- one run, in a separate process; returns bytes read
def ours(source: str, workers: int, samples: int) -> int:
    from data_pipeline.shards.samples import Samples
    from data_pipeline.stream.stream import Reading, Stream

    dataset = Samples([source])
    largest = max(int(piece.records["size"].max()) for piece in dataset.pieces(0, len(dataset)))
    row = np.zeros(largest, np.uint8)  # all rows of a batch have the same length

    def raw(sample: dict, rng: Any) -> dict:
        data = np.frombuffer(sample["image"].data, np.uint8)
        row[: data.size] = data
        return {"bytes": row, "size": data.size}

    stream = Stream(dataset, raw, BATCH, reading=Reading(workers=workers, ahead_mb=64))
    got = sum(int(next(stream)["size"].sum()) for _ in range(samples // BATCH))
    stream.close()
    return got


def webdataset(source: str, workers: int, samples: int) -> int:
    import fsspec
    import webdataset as wds
    from torch.utils.data import DataLoader

    fs, path = fsspec.core.url_to_fs(source)
    urls = [fs.unstrip_protocol(p) if "://" in source else p for p in sorted(fs.glob(f"{path}/*.tar"))]
    if "://" in source:  # webdataset cannot read s3://: one signed GET per shard, read as one stream
        urls = [f"pipe:curl -s '{fs.sign(url)}'" for url in urls]
    data = wds.WebDataset(urls, shardshuffle=False, resampled=False).to_tuple("jpg").repeat()
    got = seen = 0
    for batch in DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=list):
        got += sum(len(item) for (item,) in batch)
        seen += len(batch)
        if seen >= samples:
            return got
    raise AssertionError


def streaming(source: str, workers: int, samples: int) -> int:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    data = StreamingDataset(local=f"{source}-mds", shuffle=False, batch_size=BATCH)
    return _epochs(lambda: DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=list), "jpg", samples)


def litdata(source: str, workers: int, samples: int) -> int:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(f"{source}-lit", shuffle=False)
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=list)
    return _epochs(lambda: loader, "jpg", samples)


def _epochs(loader: Any, key: str, samples: int) -> int:
    """Read epochs of a loader until `samples` samples were read."""
    got = seen = 0
    while True:
        for batch in loader():
            got += sum(len(item[key]) for item in batch)
            seen += len(batch)
            if seen >= samples:
                return got


def convert(source: str) -> None:
    """Write the same JPEGs as MDS and litdata shards."""
    import litdata as lit
    import webdataset as wds
    from streaming import MDSWriter

    urls = sorted(str(p) for p in Path(source).glob("*.tar"))
    images = [sample["jpg"] for sample in wds.WebDataset(urls, shardshuffle=False)]
    with MDSWriter(out=f"{source}-mds", columns={"jpg": "bytes"}, size_limit=20 << 20) as out:
        for image in images:
            out.write({"jpg": image})
    lit.optimize(_wrap, images, f"{source}-lit", chunk_bytes="20MB", num_workers=1)


def _wrap(image: bytes) -> dict[str, bytes]:
    return {"jpg": image}


LOADERS = {f.__name__: f for f in (ours, webdataset, streaming, litdata)}


def child(name: str, source: str, workers: int, samples: int) -> None:
    """The main function of a process that measures one loader: print its seconds and bytes."""
    if name.startswith("start_"):
        print(json.dumps({"seconds": first_batch(name.removeprefix("start_"), source, workers)}), flush=True)
        return
    start = time.perf_counter()
    got = LOADERS[name](source, workers, samples)
    wall = time.perf_counter() - start
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    print(json.dumps({"cpu": cpu, "wall": wall, "bytes": got}), flush=True)


# ---------------------------------------------------------------- the comparison
def run(
    python: str, name: str, source: str, workers: int, samples: int, env: dict[str, str] | None = None
) -> dict[str, float]:
    command = [python, __file__, "--child", name, source, str(workers), str(samples)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent), **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def per_sample(python: str, name: str, source: str) -> tuple[float, float]:
    """(CPU ms, wall ms) per sample."""
    short, long = (run(python, name, source, 1, count) for count in (COUNT, 3 * COUNT))
    return tuple(1e3 * (long[key] - short[key]) / (2 * COUNT) for key in ("cpu", "wall"))  # type: ignore[return-value]


def make_shards(folder: Path, count: int) -> None:
    """Write shards with windows of real photographs, 500×375, about 75 kB each."""
    from PIL import Image
    from sklearn.datasets import load_sample_image
    from webdataset import TarWriter

    from data_pipeline.shards import index

    pictures = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with TarWriter(str(folder / f"{shard:06d}.tar")) as tar:
            for n in range(count // SHARDS):
                picture = pictures[n % 2]
                top, left = rng.integers(0, picture.shape[0] - 374), rng.integers(0, picture.shape[1] - 499)
                out = io.BytesIO()
                Image.fromarray(picture[top : top + 375, left : left + 500]).save(out, "JPEG", quality=93)
                tar.write({"__key__": f"{shard:03d}{n:05d}", "jpg": out.getvalue()})
    index.write(folder, say=lambda _: None)


def local(source: str, peers: str | None, rounds: int) -> None:
    pythons = {"webdataset": sys.executable, **({"streaming": peers, "litdata": peers} if peers else {})}
    if peers:
        subprocess.run([peers, __file__, "--convert", source], check=True, capture_output=True)
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in pythons}
    for _ in range(rounds):
        cpu, wall = per_sample(sys.executable, "ours", source)
        print(f"ours: {cpu:.3f} ms CPU, {wall:.3f} ms wall per sample", file=sys.stderr)
        for name, python in pythons.items():
            theirs = per_sample(python, name, source)
            print(f"{name}: {theirs[0]:.3f} ms CPU, {theirs[1]:.3f} ms wall per sample", file=sys.stderr)
            ratios[name].append((cpu / theirs[0], wall / theirs[1]))
    for name, values in ratios.items():
        emit(f"stream.raw.cpu_versus_{name}", median(v[0] for v in values), "ratio of CPU seconds", name)
        emit(f"stream.raw.wall_versus_{name}", median(v[1] for v in values), "ratio of wall seconds", name)


def remote(source: str, rounds: int) -> None:
    """Samples per second from an S3 server, with and without a limit of the rate of each connection.

    Without a limit the machine is the bottleneck. With a limit, as real stores have, the number of connections is.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.services import FaultProxy, ObjectStore, environment

    with tempfile.TemporaryDirectory() as folder, ObjectStore(Path(folder)) as store, FaultProxy(store.port) as proxy:
        url = store.put_folder(Path(source), "bench")
        env = environment(proxy.port) | {"UNLABELED_CACHE": f"{folder}/cache"}
        for name, rate in (("s3_30ms", 0.0), ("s3_30ms_23MBps", 23e6)):
            proxy.set(latency=0.03, rate=rate)
            ratios = []
            for _ in range(rounds):
                rates = {loader: _rate(loader, url, env) for loader in ("ours", "webdataset")}
                print(f"{name}: {rates} samples/s", file=sys.stderr)
                ratios.append(rates["ours"] / rates["webdataset"])
            emit(
                f"stream.{name}.rate_versus_webdataset", median(ratios), "ratio of samples/s", "webdataset, one stream"
            )


def _rate(loader: str, url: str, env: dict[str, str]) -> float:
    few, many = (
        (2 * COUNT, 5 * COUNT) if loader == "ours" else (COUNT // 2, 3 * COUNT // 2)
    )  # ours: long enough to fill the shuffle window
    short, long = (run(sys.executable, loader, url, 1, n, env) for n in (few, many))
    return round((many - few) / (long["wall"] - short["wall"]), 1)


def shuffle() -> None:
    from data_pipeline.order.schedule import Phase, Plan

    count, classes, batch = 1_280_000, 1000, 4096
    plan = Plan([count], [Phase(0, batch)])
    expected, ratios = batch / classes, []
    for step in range(100, 150):
        labels = plan.slots(step, 0, batch).global_index % count // (count // classes)
        ratios.append(
            float(((np.bincount(labels, minlength=classes) - expected) ** 2 / expected).sum() / (classes - 1))
        )
    order = plan.orders[0]
    emit(
        "stream.shuffle.chi2_per_dof",
        float(np.mean(ratios)),
        f"{plan.lanes * order.chunk * order.block} samples in memory",
        "a random order: 1",
    )


def starts(source: str, rounds: int) -> None:
    for method in ("fork", "forkserver", "spawn"):
        taken = [run(sys.executable, f"start_{method}", source, 2, BATCH)["seconds"] for _ in range(rounds)]
        emit(f"stream.start_seconds.{method}", median(taken), "s", "two workers, to the first batch")


def first_batch(method: str, source: str, workers: int) -> float:
    """Seconds to the first batch of a run's own stream."""
    from data_pipeline.stream.worker_processes import start_server
    from pretrain.build import build_objective, build_stream, open_samples
    from pretrain.recipes.recipe import load

    options = [f"data.train={source}", f"data.batch={BATCH}", f"data.workers={workers}", f"data.start_method={method}"]
    cfg = load("demo", [*options, "model=vit_micro"])
    if method == "forkserver":
        start_server(["pretrain.build"])
    stream = build_stream(cfg, build_objective(cfg, empty=True), open_samples(cfg))
    if method == "forkserver":
        time.sleep(SERVER_SECONDS)
    began = time.perf_counter()
    next(stream)
    seconds = time.perf_counter() - began
    stream.close()
    return seconds


def emit(name: str, value: float, unit: str, versus: str) -> None:
    print(json.dumps({"name": name, "value": float(f"{value:.3g}"), "unit": unit, "versus": versus}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="a Python with mosaicml-streaming and litdata")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["local", "s3", "shuffle", "starts"])
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--convert", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, source, workers, samples = args.child
        return child(name, source, int(workers), int(samples))
    if args.convert:
        return convert(args.convert)
    if args.only in (None, "shuffle"):
        shuffle()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "shards")
        source.mkdir()
        make_shards(source, 4 * BATCH if args.only == "starts" else COUNT)
        if args.only in (None, "local"):
            local(str(source), args.peers, args.rounds)
        if args.only in (None, "starts"):
            starts(str(source), args.rounds)
        if args.only in (None, "s3"):
            remote(str(source), args.rounds)


if __name__ == "__main__":
    main()
