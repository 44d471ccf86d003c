"""A source of images that are frames of videos: time is divided into intervals of some seconds, and the first frame in
each interval becomes a JPEG.

The survey reads the packets of a whole video without decoding them, to find the times of its frames. It divides the
video into pieces. A worker decodes a piece from the key frame before its first frame on. After a decoding error the
rest of the piece is left out, because most decoders continue with invented frames.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import xxhash
from PIL import Image

from common.errors import Damaged, DataError
from data_pipeline.build.sources.media_folders import Images, Videos, annotated
from data_pipeline.build.sources.source import Entry, Options, safe_name
from data_pipeline.build.sources.source_files import READ_ERRORS, Tree, reason_of
from data_pipeline.formats import videos
from data_pipeline.formats.av_files import av_failure, need_av
from data_pipeline.formats.videos import checked, decoded, guarded, pixels_of, time_of

DEFAULT_INTERVAL = 1.0  # seconds
MIN_INTERVAL = 0.001  # seconds; keys state the time of a frame in milliseconds
JPEG_QUALITY = 95
# A video counts as cut off if more than this share of its stated duration, plus one second, is missing: stated
# durations are inexact.
LENGTH_TOLERANCE = 0.02
BYTES_PER_PIXEL = 0.4  # approximate size of a JPEG of JPEG_QUALITY


def check_every(options: Options) -> None:
    """Raise DataError if `frames_every` is not a valid interval between frames."""
    every = options.frames_every
    if every is not None and not (math.isfinite(every) and every >= MIN_INTERVAL):
        raise DataError(
            f"--frames-every {every:g}: write the interval between two frames in seconds, at least {MIN_INTERVAL:g}"
        )


class Frames(Images):
    """Frames of videos as images. Pieces: those of `survey`, with what `_stated` returns at the end."""

    kind = "frames"
    title = "folder of videos, whose frames become images"
    reads = ("labels", "label_field", "as_stored", "frames_every")
    has_maps = False
    takes = Videos.takes

    def begin(self) -> None:
        need_av()
        self.options = replace(self.options, frames_every=self.options.frames_every or DEFAULT_INTERVAL)
        super().begin()
        self.notes.append(
            f"the first frame of every {self.options.frames_every:g} s of a video becomes a JPEG of quality"
            f" {JPEG_QUALITY}; --frames-every SECONDS changes the interval"
        )

    def files_to_survey(self) -> list[str]:
        return [file.path for file in self.files]

    def survey(self, path: str) -> dict[str, Any]:
        """Divide a video into blocks; see `Source.survey`.

        Each piece is [path, time of the video's first frame, first interval, last interval, time of the piece's first
        frame, number of frames], with times in units of the video's time base.
        """
        try:
            times, problem, pixels, intervals = self._scan_video(path)
        except (Damaged, *READ_ERRORS) as reason:
            return {"blocks": [], "bad": [[path, reason_of(reason)]]}
        starts: dict[int, int] = {}  # {interval: time of its first frame}
        for time in sorted(times):
            starts.setdefault(intervals.number(time), time)
        frame_bytes = int(pixels * BYTES_PER_PIXEL) + self.overhead
        numbers, frames_per_block, blocks = list(starts), max(1, self.limit // frame_bytes), []
        for first in range(0, len(numbers), frames_per_block):
            part = numbers[first : first + frames_per_block]
            piece = [path, intervals.first, part[0], part[-1], starts[part[0]], len(part)]
            blocks.append([len(part) * frame_bytes, len(part), piece])
        return {"blocks": blocks, "bad": [[path, problem]] if problem else []}

    def _scan_video(self, path: str) -> tuple[list[int], str, int, Intervals]:
        """(times of a video's frames, a description of its damage or "", pixels of its first frame, its intervals).

        Raises `Damaged` if the video has no frames, or none whose time is known.
        """
        times: list[int] = []
        problem, packets, end = "", 0, Fraction(0)  # `end`: of the last packet, in seconds
        with open_video(self.tree, path) as (video, stream):
            picture = next(decoded(video, stream), None)
            if picture is None:
                raise Damaged("holds no frames")
            pixels = checked(picture).width * picture.height
        with open_video(self.tree, path) as (video, stream):
            try:
                for packet in guarded(video.demux()):
                    time = time_of(packet)
                    if not packet.size or time is None:
                        continue
                    if packet.is_corrupt:
                        raise Damaged("one of its packets is damaged")
                    end = max(end, (time + (packet.duration or 0)) * packet.time_base)
                    if packet.stream.index == stream.index:
                        packets += 1
                        if not packet.is_discard:
                            times.append(time)
                if packets < stream.frames:
                    raise Damaged(f"it holds only {packets} of the {stream.frames} frames that its header states")
                stated = Fraction(video.duration or 0, 1_000_000) + Fraction(video.start_time or 0, 1_000_000)
                if stated - end > LENGTH_TOLERANCE * stated + 1:
                    raise Damaged(f"it ends after {float(end):.1f} s, but its header states {float(stated):.1f} s")
            except Damaged as reason:
                problem = f"is damaged; frames up to the damage are used: {reason}"
            if not times:
                raise Damaged("does not state the times of its frames")
            return times, problem, pixels, Intervals(min(times), stream.time_base, self._every)

    @property
    def _every(self) -> Fraction:
        return Fraction(str(self.options.frames_every))

    def entries(self, piece: list[Any]) -> Iterator[Entry | None]:
        path, begin, first, last, start, count, stated = piece
        yielded, last_yielded, reason = 0, first - 1, ""  # frames, the interval of the last one
        # Try to seek to the first frame of the piece. If that yields no frame, decode the video from its beginning.
        for seek in (True, False) if start > begin else (False,):
            try:
                with open_video(self.tree, path) as (video, stream):
                    intervals = Intervals(begin, stream.time_base, self._every)
                    for picture in _frames_from(video, stream, start) if seek else decoded(video, stream):
                        time = time_of(picture)
                        interval = last_yielded if time is None else intervals.number(time)
                        if interval > last:
                            break
                        if interval > last_yielded:
                            yield self._frame(path, picture, intervals.seconds(time), stated)
                            yielded, last_yielded = yielded + 1, interval
                        if yielded == count:
                            break
                reason = f"{count - yielded} of {count} frames are left out: the decoder did not return them"
            except (Damaged, *READ_ERRORS) as damage:
                reason = f"{count - yielded} of {count} frames are left out: {reason_of(damage)}"
            if yielded:
                break
        if yielded < count:
            yield Entry(path, reason=reason)
            yield from [None] * (count - yielded - 1)

    def _frame(self, path: str, picture: Any, seconds: Fraction, stated: list[Any]) -> Entry:
        if checked(picture).is_corrupt:
            raise Damaged(f"the frame at {float(seconds):.3f} s is damaged")
        pixels = pixels_of(picture, 3, upright=not self.options.as_stored)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=JPEG_QUALITY)
        facts = {"path": path, "seconds": round(float(seconds), 3)}
        members = {"jpg": out.getvalue(), **annotated(stated, facts)}
        return Entry(f"{path} at {float(seconds):.3f} s", f"{_video_name(path)}/{int(seconds * 1000):09d}", members)

    def key(self, number: int, entry: Entry) -> str:
        """The key VIDEO/MILLISECONDS, which does not depend on the other videos."""
        return entry.name


class Intervals:
    """The duration of a video, divided into intervals of `every` seconds from its first frame on.

    Times are integers in units of `base` seconds, the time base of the video. `first` is the time of the first frame.
    """

    def __init__(self, first: int, base: Fraction, every: Fraction):
        self.first, self.base = first, base
        ratio = base / every
        self.numerator, self.denominator = ratio.numerator, ratio.denominator

    def number(self, time: int) -> int:
        """The number of the interval that contains a time."""
        return (time - self.first) * self.numerator // self.denominator

    def seconds(self, time: int) -> Fraction:
        """The seconds from the first frame to a time."""
        return (time - self.first) * self.base


def _video_name(path: str) -> str:
    """A readable name for a video. It ends with a hash of the path, so that a.mp4, a.mkv and x/a.mp4 differ."""
    digest = xxhash.xxh3_64_hexdigest(path.encode(errors="surrogateescape"))[:8]
    return f"{safe_name(path.rpartition('.')[0])}-{digest}"


# ---------------------------------------------------------------- PyAV
@contextmanager
def open_video(tree: Tree, path: str) -> Iterator[tuple[Any, Any]]:
    """(the open video, its video stream) of a file of a source; one thread decodes it. Raises `Damaged`."""
    with tree.open(path) as file:
        if not tree.stat(path).size:
            raise Damaged("is empty: 0 bytes")
        with videos.open_video(file) as opened:
            yield opened


def _frames_from(video: Any, stream: Any, start: int) -> Iterator[Any]:
    """Yield the frames from the time `start` on, decoded from a key frame at least a second before it, if there is one.

    Raises `Damaged` if seeking fails.
    """
    av = need_av()
    try:
        video.seek(start - math.ceil(1 / stream.time_base), stream=stream)
    except av.error.FFmpegError as error:
        raise Damaged(av_failure(error)) from None
    is_first = True
    for picture in decoded(video, stream):
        if is_first and (picture.pts is None or picture.pts > start):
            raise Damaged("no key frame was found before the first frame of the piece")
        is_first = False
        if picture.pts is None or picture.pts >= start:
            yield picture
