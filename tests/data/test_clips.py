"""Clips of videos: which frames they hold at which times, how much is decoded for them, and that faults are damage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import Damaged
from data_pipeline.formats import videos
from data_pipeline.formats.decode_budget import Budget
from data_pipeline.formats.videos import EncodedVideo
from data_pipeline.parts.part import About
from data_pipeline.parts.video_clip import Clip, Clips
from data_pipeline.shards.samples import Samples
from data_pipeline.views.augmentations import Augment, generators
from data_pipeline.views.clip_views import clip_crops
from tests.tars import jpeg, write_tar

H264 = {"g": "12", "bf": "3", "crf": "4", "x264-params": "open-gop=1"}


def counted(frames: int, rate: int, codec: str = "libx264", form: str = "mp4", **options: str) -> bytes:
    """A video of 48 × 32 pixels whose frame i has the grey value 5 · i."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=form) as out:
        stream = out.add_stream(codec, rate=rate, options=options or (H264 if codec == "libx264" else {}))
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 48, 32, "yuv420p", 8_000_000
        for i in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 48, 3), 5 * i, np.uint8), "rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def numbers(frames: list[np.ndarray]) -> list[int]:
    return [round(float(frame.mean()) / 5) for frame in frames]


def shown(data: bytes, *clips: list[float]) -> list[list[int]]:
    return [numbers(clip) for clip in EncodedVideo(data).frames_at(lambda _: clips)]


@pytest.mark.parametrize(
    "codec, form", [("libx264", "mp4"), ("libx264", "matroska"), ("mpeg4", "avi"), ("libvpx-vp9", "webm")]
)
def test_frames_are_those_shown_at_the_times(codec: str, form: str):
    data = counted(50, 25, codec, form)
    assert shown(data, [0.0, 0.04, 0.079, 0.08, 1.0, 1.96, 9.0]) == [[0, 1, 1, 2, 25, 49, 49]]
    assert shown(data, [1.5, 1.9], [0.3, 1.54]) == [[37, 47], [7, 38]]


def test_the_rate_of_the_video_does_not_change_the_times_of_a_clip():
    slow, fast = (Clips(EncodedVideo(counted(2 * rate, rate)), 4, 5.0).spread(1)[0] for rate in (10, 20))
    assert [n / 10 for n in numbers(slow)] == [0.6, 0.8, 1.0, 1.2]
    assert [n / 20 for n in numbers(fast)] == [0.6, 0.8, 1.0, 1.2]


def test_clips_begin_anywhere_and_stay_in_the_video():
    clips = Clips(EncodedVideo(counted(50, 25)), 4, 5.0).drawn(60, np.random.default_rng(0))
    begins = {numbers(clip)[0] for clip in clips}
    assert min(begins) <= 2 and 26 <= max(begins) <= 30 and len(begins) > 20  # the last of 1.2 s
    assert all(np.diff(numbers(clip)).tolist() == [5, 5, 5] for clip in clips)
    (short,) = Clips(EncodedVideo(counted(10, 25)), 4, 5.0).drawn(1, np.random.default_rng(0))
    assert numbers(short) == [0, 5, 9, 9]


def test_only_what_the_clips_need_is_decoded_and_once(monkeypatch: pytest.MonkeyPatch):
    data, frames, opened = counted(50, 25, g="12", bf="3", crf="4"), [0], [0]
    frames_from, open_video = videos.frames_from, videos.open_video

    def counting(*arguments: Any) -> Any:
        for frame in frames_from(*arguments):
            frames[0] += 1
            yield frame

    def opening(*arguments: Any) -> Any:
        opened[0] += 1
        return open_video(*arguments)

    monkeypatch.setattr(videos, "frames_from", counting)
    monkeypatch.setattr(videos, "open_video", opening)
    assert shown(data, [0.04, 0.08], [0.08, 1.64], [1.6]) == [[1, 2], [2, 41], [40]]
    assert opened == [1 + 2] and frames == [3 + 9]  # key frames: 0, 11, 22, 33, 44
    opened[0] = 0
    assert shown(counted(50, 25, g="1"), [0.04, 0.08, 0.4]) == [[1, 2, 10]] and opened == [1 + 1]  # all are key frames
    opened[0] = 0
    refused = counted(50, 25)  # after the key frame 33, a frame releases a reference from before it
    assert shown(refused, [1.6, 1.64]) == [[40, 41]] and opened == [3]  # decoded from the beginning


def test_faults_are_damage():
    data = counted(50, 25)
    holes = bytearray(data)
    for i in range(data.index(b"mdat") + 800, data.index(b"moov"), 5):
        holes[i] ^= 0x55
    for bad in (b"", data[: len(data) // 2], b"\0" * 1000, bytes(holes), b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"):
        with pytest.raises(Damaged):
            shown(bad, [0.0, 0.5, 1.0, 1.5])
    with pytest.raises(Damaged, match="48×32 pixels, but at most 1000"):
        EncodedVideo(data, max_pixels=1000).frames_at(lambda _: [[0.0]])
    cut = counted(50, 25, "mpeg4", "avi")
    with pytest.raises(Damaged, match=r"it holds only .* of the 50 frames that its header states|damaged"):
        shown(cut[: len(cut) * 2 // 3], [0.0])


def test_clips_of_a_sample(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("0.mp4", counted(20, 10)), ("0.cls", b"1"), ("1.jpg", jpeg(1)), ("2.cls", b"1")])
    samples, part = Samples([str(tmp_path)]), Clip(frames=3, fps=5.0)
    columns = samples.columns(part.extensions)
    video, still = (samples.sample(n, samples.read_columns(n, columns), {"clip": part}) for n in (0, 1))
    budget = Budget()
    with budget.lease() as take:
        video["clip"].reserve = take
        views = clip_crops(video, Augment(16, (0.3, 1.0)), 2, generators((1, 0)))
    assert budget.peak >= 48 * 32 * 3 * 6
    assert views["clip"].shape == (2, 3, 3, 16, 16) and views["clip"].dtype == np.uint8
    levels = views["clip"].mean((2, 3, 4)) / 5
    np.testing.assert_allclose(np.diff(levels, axis=1), 2.0, atol=0.3)
    assert levels[0, 0] != levels[1, 0]
    again = clip_crops(video, Augment(16, (0.3, 1.0)), 2, generators((1, 0)))
    np.testing.assert_array_equal(views["clip"], again["clip"])
    frames = clip_crops(still, Augment(16, (0.3, 1.0)), 1, generators((1, 0)))["clip"][0]
    assert (frames == frames[:1]).all() and frames.std() > 1  # one crop of the image, three times
    with pytest.raises(Damaged, match=r"holds no clip member \(mp4, "):
        samples.sample(2, {}, {"clip": part})
    placed = Clip(mean=(0.0,) * 3, std=(0.5,) * 3).place(torch.from_numpy(frames), torch.device("cpu"))
    torch.testing.assert_close(placed, torch.from_numpy(frames).float() / 127.5)


def test_all_frames_of_a_clip_have_the_same_crop_and_colours():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 40, 40, 3), dtype=np.uint8).repeat(3, 0).copy()
    sample = {"clip": Clip(frames=3, fps=1.0).stand_in("clip", rng, About(image_size=16))["clip"]}
    sample["clip"].film.pixels = pixels  # equal frames, in arrays of their own
    views = clip_crops(
        sample, Augment(16, (0.2, 0.6), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0), 2, generators((1, 0))
    )
    assert (views["clip"] == views["clip"][:, :1]).all() and (views["clip"][0] != views["clip"][1]).any()
