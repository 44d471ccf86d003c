"""A source of videos that are stored as folders of numbered JPEGs or PNGs, a file for each frame.

Each folder becomes a QuickTime video whose frames are the bytes of the files: nothing is encoded again. The frames are in
the order of the numbers in their names.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import cached_property
from typing import Any

from common.errors import Damaged, DataError
from common.untrusted import is_number
from data_pipeline.build.sources.media_folders import Videos, annotated
from data_pipeline.build.sources.source import Block, Entry, Options
from data_pipeline.build.sources.source_files import File, reason_of
from data_pipeline.formats.av_files import need_av
from data_pipeline.formats.decode import Encoded
from data_pipeline.formats.image_formats import JPEG, JPEG_START, PNG_START

# {FFmpeg's name of a codec: (the first bytes of a file, the format of its pixels)}
CODECS = {"mjpeg": (JPEG_START, "yuvj420p"), "png": (PNG_START, "rgb24")}
MAX_FPS = 1000.0


def check_fps(options: Options) -> None:
    """Raise DataError if `fps` is no valid number of frames per second."""
    if options.fps is not None and not (math.isfinite(options.fps) and 0 < options.fps <= MAX_FPS):
        raise DataError(
            f"--fps {options.fps:g}: write the number of frames in a second, above 0 and at most {MAX_FPS:g}"
        )


class FrameFolders(Videos):
    """A folder of folders of frames; `files` has the latter. Pieces: [folder, names of its files, what
    `_stated` returns]."""

    kind = "frame-folders"
    title = "folder of folders of frames"
    reads = ("labels", "label_field", "fps")

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in (*JPEG, "png") and "/" in file.path

    @cached_property
    def frames(self) -> dict[str, list[File]]:
        """{folder: its files, in order}."""
        found = dict[str, list[File]]()
        for file in self.tree.files:
            if self.takes(file):
                found.setdefault(file.path.rpartition("/")[0], []).append(file)
        return {folder: sorted(files, key=lambda file: by_numbers(file.path)) for folder, files in found.items()}

    @cached_property
    def files(self) -> list[File]:
        return [
            File(folder, sum(file.size for file in files), hashlib.sha256(repr(files).encode()).hexdigest())
            for folder, files in self.frames.items()
        ]

    def other_files(self) -> list[File]:
        return [file for file in self.tree.files if not self.takes(file)]

    def begin(self) -> None:
        if self.options.fps is None:
            raise DataError(f"{self.tree.url}: frames do not state their times; write --fps N, frames in a second")
        super().begin()

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        for size, rows, (folder, stated) in super().blocks(surveys):
            yield Block(size, rows, [folder, [file.path for file in self.frames[folder]], stated])

    def entries(self, piece: list[Any]) -> Iterator[Entry | None]:
        folder, paths, stated = piece
        fps = self.options.fps
        assert fps is not None
        try:
            video = muxed(((path, self.tree.read(path)) for path in paths), fps)
        except (OSError, Damaged) as reason:
            yield Entry(folder, reason=reason_of(reason))
            return
        members = {"mov": video, **annotated(stated, {"path": folder, **self.annotation(video)})}
        yield Entry(folder, folder.rpartition("/")[2], members)


def by_numbers(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, in which numbers are compared by their values: 2.jpg is before 10.jpg."""
    return [(int(part), "") if is_number(part) else (0, part) for part in re.split(r"(\d+)", name)]


def muxed(frames: Iterator[tuple[str, bytes]], fps: float) -> bytes:
    """A QuickTime video of the frames (name, bytes of a JPEG or PNG), each shown for 1 / fps seconds. Every frame is
    decoded, to find damaged ones. Raises `Damaged` for a frame of another format or size than the first one."""
    av, out, codec, first = need_av(), io.BytesIO(), "", (0, 0)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(out, "w", format="mov") as video:
        for number, (name, data) in enumerate(frames):
            of = next((codec for codec, (start, _) in CODECS.items() if data.startswith(start)), "")
            if not of:
                raise Damaged(f"{name} is neither a JPEG nor a PNG")
            height, width = Encoded(data, "png" if of == "png" else "jpg", 3, as_stored=True).pixels().shape[:2]
            if not number:
                codec, first = of, (width, height)
                stream = video.add_stream(codec, rate=rate)
                stream.width, stream.height, stream.pix_fmt = width, height, CODECS[codec][1]
                stream.time_base = 1 / rate
            if (of, (width, height)) != (codec, first):
                raise Damaged(
                    f"{name} is a {of} of {width}×{height} pixels, but the first frame is a {codec} of"
                    f" {first[0]}×{first[1]}; all frames of a video need one format and one size"
                )
            packet = av.Packet(data)
            packet.pts = packet.dts = number
            packet.duration, packet.time_base = 1, 1 / rate
            packet.is_keyframe, packet.stream = True, stream
            video.mux(packet)
    return out.getvalue()
