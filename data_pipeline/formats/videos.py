"""Videos with PyAV: opening the bytes of a file, facts about it, and the frames that are shown at given times.

Times are integers in units of the time base of the video stream, as the container states them. Every fault of the file
or of its decoder is `Damaged`, never a missing frame.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import IO, Any, NamedTuple

import numpy as np

from common.errors import Damaged
from data_pipeline.formats.av_files import av_failure, need_av, open_av
from data_pipeline.formats.image_formats import MAX_PIXELS

MAX_FRAME_SIDE = 65500  # pixels; the limit of JPEG
PIXEL_FORMATS = {1: "gray", 3: "rgb24"}  # {channels: FFmpeg's name for uint8 pixels}
DECODER_FRAMES = 16  # frames that a decoder may hold for reference, each of at most 1.5 bytes per pixel
NEAR = 8  # up to so many frames are decoded and not used, instead of opening the video again at a later key frame


# ---------------------------------------------------------------- opening
@contextmanager
def open_video(source: bytes | IO[bytes], strict: bool = True) -> Iterator[tuple[Any, Any]]:
    """(the open video, its video stream) of the bytes of a file, or of an open file; one thread decodes it. Raises
    `Damaged`.

    `strict`: errors of the bit stream end the decoding; otherwise most decoders continue with invented pixels.
    """
    with open_av(source) as video:
        stream = stream_of(video)
        stream.codec_context.thread_count = 1
        if strict:
            stream.codec_context.options = {"err_detect": "explode"}
        yield video, stream


def stream_of(video: Any) -> Any:
    """The video stream of an open file. Raises `Damaged`."""
    if not video.streams.video:
        raise Damaged("holds no video stream")
    stream = video.streams.video[0]
    if stream.codec_context is None:
        raise Damaged("has a codec that PyAV does not know")
    if stream.codec_context.width:  # otherwise it is known once a frame is decoded
        checked(stream.codec_context)
    return stream


def checked(picture: Any, max_pixels: int = MAX_PIXELS) -> Any:
    """`picture` itself, a frame or a codec context. Raises `Damaged` if its size is not allowed."""
    if not 0 < picture.width * picture.height <= max_pixels or max(picture.width, picture.height) > MAX_FRAME_SIDE:
        raise Damaged(
            f"{picture.width}×{picture.height} pixels, but at most {max_pixels} and sides of {MAX_FRAME_SIDE} are"
            " allowed"
        )
    return picture


def decoded(video: Any, stream: Any) -> Iterator[Any]:
    """Yield the frames from the current position of a video on, in presentation order. Raises `Damaged`."""
    return guarded(video.decode(stream))


def guarded(parts: Iterable[Any]) -> Iterator[Any]:
    """Yield the packets or frames of PyAV's iterator `parts`. Raises `Damaged` for an error of FFmpeg."""
    av = need_av()
    parts = iter(parts)
    while True:
        try:
            part = next(parts)
        except StopIteration:
            return
        except av.error.EOFError:
            return
        except av.error.FFmpegError as error:
            raise Damaged(av_failure(error)) from None
        yield part


def time_of(part: Any) -> int | None:
    """The presentation time of a packet or frame, or its decoding time if the container states no other."""
    return part.dts if part.pts is None else part.pts


# ---------------------------------------------------------------- facts
def video_facts(data: bytes) -> dict[str, Any]:
    """{"width", "height", "seconds"} of a video, whose first frame is decoded. Raises `Damaged`."""
    with open_video(data, strict=False) as (video, stream):
        frame = next(decoded(video, stream), None)
        if frame is None:
            raise Damaged("holds no frames")
        pixels_of(checked(frame), 3)
        seconds = round(video.duration / 1e6, 3) if video.duration else None
        return {"width": frame.width, "height": frame.height, "seconds": seconds}


def pixels_of(frame: Any, channels: int, upright: bool = False) -> np.ndarray:
    """The pixels of a frame, uint8 [H, W, channels]. `upright`: apply the rotation that the file states. Raises
    `Damaged`."""
    try:
        pixels = frame.to_ndarray(format=PIXEL_FORMATS[channels], threads=1)
    except ValueError as error:
        raise Damaged(av_failure(error)) from None
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    turns = round(frame.rotation / 90) % 4 if upright else 0
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


class Timeline(NamedTuple):
    """When the frames of a video are shown, from its packets."""

    times: list[int]  # of all frames, sorted
    key_times: list[int]  # of the frames at which decoding can begin, sorted
    end: int  # the end of the last frame
    base: Fraction  # seconds of one unit of time

    def frames_at(self, seconds: Sequence[float]) -> list[int]:
        """For each time in seconds from the first frame on: the time of the frame that is shown then. Before the
        first frame that is the first one, and after the end the last one."""
        units = [self.times[0] + second / float(self.base) for second in seconds]
        return [self.times[max(0, bisect_right(self.times, unit + 1e-6) - 1)] for unit in units]

    def seek_pays(self, time: int, later: int) -> bool:
        """Whether the last key frame at or before `later` is more than NEAR frames after the frame at `time`. If it is
        nearer, decoding the frames between costs less than opening the video again."""
        keys = bisect_right(self.key_times, later)
        after = bisect_right(self.times, self.key_times[keys - 1]) if keys else 0
        return after - bisect_right(self.times, time) > NEAR

    @property
    def seconds(self) -> float:
        return float((self.end - self.times[0]) * self.base)


def timeline(video: Any, stream: Any) -> Timeline:
    """The times of all frames of an open video, from its packets, none of which is decoded. Raises `Damaged` if packets
    are damaged or missing."""
    times: list[int] = []
    keys: list[int] = []
    packets, end = 0, 0
    for packet in guarded(video.demux(stream)):
        time = time_of(packet)
        if not packet.size or time is None:
            continue
        if packet.is_corrupt:
            raise Damaged("one of its packets is damaged")
        packets += 1
        if packet.is_discard:
            continue
        times.append(time)
        end = max(end, time + (packet.duration or 0))
        if packet.is_keyframe:
            keys.append(time)
    if packets < stream.frames:
        raise Damaged(f"it holds only {packets} of the {stream.frames} frames that its header states")
    if not times:
        raise Damaged("does not state the times of its frames")
    return Timeline(sorted(times), sorted(keys), max(end, *times), stream.time_base)


# ---------------------------------------------------------------- frames at given times
class EncodedVideo:
    """A video whose frames are decoded when `frames_at` is called.

    `channels`: 3 for RGB or 1 for luma. `as_stored`: do not apply the rotation that the file states. Every failure
    raises `Damaged`. `reserve`, if it is set, is called before decoding with the number of bytes that it will use.
    """

    def __init__(self, data: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS, as_stored: bool = False):
        self.data, self.channels, self.max_pixels, self.as_stored = data, channels, max_pixels, as_stored
        self.reserve: Callable[[int], None] | None = None

    def frames_at(self, choose: Callable[[float], Sequence[Sequence[float]]]) -> list[list[np.ndarray]]:
        """Clips of the video, each a list of frames uint8 [H, W, channels], which all clips decode together.

        `choose(seconds)` gets the duration of the video, and returns for each clip the times of its frames in seconds.
        Only frames from the key frame before a wanted frame on are decoded. A frame that is shown at several times is
        the same array each time.
        """
        with open_video(self.data) as (video, stream):
            line = timeline(video, stream)
            clips = [line.frames_at(seconds) for seconds in choose(line.seconds)]
            wanted = sorted({time for clip in clips for time in clip})
            if self.reserve:
                size = stream.codec_context.width * stream.codec_context.height
                self.reserve(round(size * (1.5 * DECODER_FRAMES + self.channels * (len(wanted) + 1))))
        frames = self._with_seeks(line, wanted)
        if len(frames) < len(wanted):  # the container or the decoder cannot seek
            with open_video(self.data) as (video, stream):
                frames |= self._shown(decoded(video, stream), wanted[len(frames) :])
        if len(frames) < len(wanted):
            seconds = float((wanted[len(frames)] - line.times[0]) * line.base)
            raise Damaged(f"the decoder did not return the frame at {seconds:.3f} s")
        return [[frames[time] for time in clip] for clip in clips]

    def _with_seeks(self, line: Timeline, wanted: list[int]) -> dict[int, np.ndarray]:
        """{time: frame} of the wanted times, from a seek to the key frame before the first of them, and before each one
        that has a later key frame. Ends early if a seek fails.

        Each seek opens the video anew, so that its decoder holds no frames of before. It fails at some key frames of
        H.264 with open groups of pictures: a frame behind them releases a reference from before them, which the strict
        decoder reports as an error.
        """
        out: dict[int, np.ndarray] = {}
        while len(out) < len(wanted):
            rest = wanted[len(out) :]
            try:
                with open_video(self.data) as (video, stream):
                    found = self._shown(frames_from(video, stream, line, rest[0]), rest, line)
            except Damaged:  # of the file, or because decoding began at a wrong place; decoding it all tells which
                break
            if not found:
                break
            out |= found
        return out

    def _shown(self, frames: Iterator[Any], wanted: list[int], line: Timeline | None = None) -> dict[int, np.ndarray]:
        """{time: frame that is shown then} for the wanted times, which are sorted. Ends where a seek to a later key
        frame of `line` reaches the next one sooner (`seek_pays`), and at once if the first frame is later than the first
        wanted time."""
        out: dict[int, np.ndarray] = {}
        last = None  # the frame before the current one
        for frame in frames:
            time = time_of(frame)
            if frame.is_corrupt:
                raise Damaged("one of its frames is damaged")
            if time is None:
                continue
            while time >= wanted[len(out)]:
                shown = frame if time == wanted[len(out)] else last
                if shown is None:
                    return out
                pixels = pixels_of(checked(shown, self.max_pixels), self.channels, not self.as_stored)
                out[wanted[len(out)]] = pixels
                if len(out) == len(wanted) or (line and line.seek_pays(time, wanted[len(out)])):
                    return out
            last = frame
        return out


def frames_from(video: Any, stream: Any, line: Timeline, time: int) -> Iterator[Any]:
    """The frames of an open video from the last key frame at or before `time` on. Raises `Damaged`."""
    av = need_av()
    key = line.key_times[max(0, bisect_right(line.key_times, time) - 1)] if line.key_times else line.times[0]
    try:
        video.seek(key, stream=stream)
    except av.error.FFmpegError as error:
        raise Damaged(av_failure(error)) from None
    return decoded(video, stream)
