"""The speed of making clips of videos on one core, compared with PyAV alone.

Figures, for 16 frames at 4 per second of artificial videos of 10 s, 30 frames per second and 340×256 pixels, in H.264
with a key frame every second (short) or every ten seconds (long):

    multimodal.clips.G.per_second       clips per CPU second of the whole part: times from packets, seeks, decoding, one
                                        crop of 224
    multimodal.clips.G.share_of_decode  CPU seconds of PyAV alone, for the same frames / ours. PyAV seeks to the key frame
                                        before the first frame, decodes to the last one, and converts the chosen frames
                                        to RGB
    multimodal.clips.short.four         clips per CPU second if four clips of a video come from one decoding / if each
                                        has its own

All alternate on the same videos and clips; each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import cv2
import numpy as np
import torch

from data_pipeline.formats.videos import EncodedVideo
from data_pipeline.parts.video_clip import Clips
from data_pipeline.views.augmentations import Augment, generators
from data_pipeline.views.clip_views import CLIPS, clip_crops

FRAMES, FPS, RATE, SECONDS = 16, 4.0, 30, 10
AUGMENT = Augment(224, (0.3, 1.0))


def video(seed: int, group: int) -> bytes:
    """A camera that moves over a smooth random picture, with a little noise."""
    rng, file = np.random.default_rng(seed), io.BytesIO()
    picture = cv2.resize(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8), (1280, 960), interpolation=cv2.INTER_CUBIC)
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"g": str(group), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        for t in range(SECONDS * RATE):
            frame = picture[t : t + 256, 2 * t : 2 * t + 340] ^ rng.integers(0, 4, (256, 340, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def ours(data: bytes, number: int, count: int = 1) -> Any:
    sample = {"clip": Clips(EncodedVideo(data), FRAMES, FPS)}
    return clip_crops(sample, AUGMENT, count, generators((0, number)))


def alone(data: bytes, number: int) -> list[np.ndarray]:
    """The frames of the same clip, as a script that knows the rate of the video reads them."""
    place = generators((0, number))(CLIPS).random(1)[0]
    start = (SECONDS - FRAMES / FPS) * place
    wanted = [int((start + n / FPS) * RATE + 1e-6) for n in range(FRAMES)]
    out = []
    with av.open(io.BytesIO(data)) as opened:
        stream = opened.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.time_base is not None
        opened.seek(int(wanted[0] / RATE / stream.time_base), stream=stream)
        for frame in opened.decode(stream):
            assert frame.pts is not None
            if round(frame.pts * stream.time_base * RATE) in wanted:
                out.append(frame.to_ndarray(format="rgb24"))
            if len(out) == FRAMES:
                break
    return out


def seconds(make: Callable[..., Any], *given: Any) -> float:
    start = time.process_time()
    make(*given)
    return time.process_time() - start


def line(name: str, value: float, unit: str, versus: str) -> None:
    print(json.dumps({"name": name, "value": round(value, 3), "unit": unit, "versus": versus}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for name, group in (("short", RATE), ("long", SECONDS * RATE)):
        videos = [video(seed, group) for seed in range(args.videos)]
        assert len(alone(videos[0], 0)) == FRAMES
        speeds, shares, fours = [], [], []
        for _ in range(args.rounds):
            mine, theirs, four = (
                sum(seconds(make, data, n, *more) for n, data in enumerate(videos))
                for make, more in ((ours, ()), (alone, ()), (ours, (4,)))
            )
            speeds.append(len(videos) / mine)
            shares.append(theirs / mine)
            fours.append(4 * mine / four)
        line(f"multimodal.clips.{name}.per_second", median(speeds), "clips per CPU second", "")
        line(
            f"multimodal.clips.{name}.share_of_decode", median(shares), "ratio", "PyAV alone, the same frames, no crops"
        )
        if name == "short":
            line("multimodal.clips.short.four", median(fours), "ratio", "one decoding for each clip")


if __name__ == "__main__":
    main()
