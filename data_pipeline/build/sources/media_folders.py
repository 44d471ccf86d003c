"""Sources that are folders of images or of videos. Each file becomes a sample; its label is its sub-folder of the first
level, or comes from a list.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from common.errors import Damaged, DataError
from data_pipeline.build.sources.source import (
    IMAGE_OPTIONS,
    Block,
    Entry,
    Source,
    class_order,
    member_of,
    refuse_splits,
    stem,
    to_json,
)
from data_pipeline.build.sources.source_files import File, extension, reason_of
from data_pipeline.build.sources.tables import Labels
from data_pipeline.formats.image_formats import IMAGES, MAX_PIXELS
from data_pipeline.shards.members import VIDEOS

MAX_FRAME_SIDE = 65500  # pixels; the limit of JPEG


class Images(Source):
    """A folder of images. Pieces: [path, class number or None]."""

    kind = "images"
    title = "folder of images"
    reads: tuple[str, ...] = ("labels", "label_field", *IMAGE_OPTIONS)
    overhead = 3072

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in IMAGES

    def begin(self) -> None:
        self._labels: dict[str, str] = {}
        if self.options.label_field and not self.options.labels:
            raise DataError("--label-field names a column of --labels FILE, which is not given")
        if self.options.labels:
            self._label_from_list(Labels(self.options.labels, self.options.label_field))
        else:
            self._labels = {f.path: f.path.partition("/")[0] for f in self.files if "/" in f.path}
            refuse_splits(self._labels.values(), self.tree)
        self.classes = class_order(set(self._labels.values()))

    def _label_from_list(self, labels: Labels) -> None:
        """Set the labels of the files that a list names. Raises DataError if it names none, or one ambiguously."""
        not_found = set(labels.by_path)
        unlabelled = []
        folders = dict[str, str]()  # {name in the list that has no folder: folder of its file}
        for file in self.files:
            found = labels.of(file.path)
            folder = file.path.rpartition("/")[0]
            if found and "/" not in found[0] and folders.setdefault(found[0], folder) != folder:
                raise DataError(
                    f"{labels.name}: names {found[0]}, but {file.path} and one in"
                    f" {folders[found[0]] or 'the source itself'} are both files with this name; write paths below the"
                    " source"
                )
            if found is None:
                unlabelled.append(file.path)
            else:
                not_found.discard(found[0])
                self._labels[file.path] = found[1]
        self.bad += [(path, f"is listed in {labels.name}, but does not exist") for path in sorted(not_found)]
        if unlabelled:
            some = ", ".join(unlabelled[:5]) + (", …" if len(unlabelled) > 5 else "")
            self.notes.append(f"{len(unlabelled)} files have no row in {labels.name} and get no label: {some}")
        if not self._labels:
            example = next(iter(labels.by_path))
            raise DataError(
                f"{labels.name}: names none of the {len(self.files)} files, for example {self.files[0].path};"
                f" its own names are like {example}. Write paths below the source"
            )

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        numbers = {name: i for i, name in enumerate(self.classes)}
        for file in self.files:
            label = self._labels.get(file.path)
            yield Block(file.size + self.overhead, 1, [file.path, None if label is None else numbers[label]])

    def entries(self, piece: list[Any]) -> Iterator[Entry | None]:
        path, label = piece
        try:
            data = self.tree.read(path)
        except OSError as error:
            yield Entry(path, reason=reason_of(error))
            return
        members = {member_of(extension(path)): data, "json": to_json({"path": path, **self.annotation(data)})}
        if label is not None:
            members["cls"] = str(label).encode()
        yield Entry(path, stem(path), members)

    def annotation(self, data: bytes) -> dict[str, Any]:
        """Further entries for the json member of a file."""
        return {}


class Videos(Images):
    """A folder of videos. Pieces: [path, class number or None]."""

    kind = "videos"
    title = "folder of videos"
    reads = ("labels", "label_field")

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in VIDEOS

    def begin(self) -> None:
        need_av()
        super().begin()

    def annotation(self, data: bytes) -> dict[str, Any]:
        try:
            return video_facts(data)
        except Damaged:
            return {}  # the check of the sample reports the damage


def need_av() -> Any:
    """The package `av` (PyAV). Raises DataError that says how to install it."""
    try:
        import av
    except ImportError:
        raise DataError(
            "the package av, which reads videos, is not installed; pip install 'unlabeled[video]'"
        ) from None
    return av


def video_facts(data: bytes) -> dict[str, Any]:
    """{"width", "height", "seconds"} of a video, whose first frame is decoded. Raises `Damaged`."""
    return first_frame(data)[1]


def first_frame(data: bytes) -> tuple[Any, dict[str, Any]]:
    """(the first frame as uint8 [H, W, 3], {"width", "height", "seconds"}) of a video. Raises `Damaged`."""
    av = need_av()
    if not data:
        raise Damaged("is empty: 0 bytes")
    try:
        # FFmpeg may use no protocol, so that a file that is a playlist cannot make it open other files or URLs.
        with av.open(io.BytesIO(data), options={"protocol_whitelist": ""}, metadata_errors="replace") as video:
            frame = next(video.decode(stream_of(video)), None)
            if frame is None:
                raise Damaged("holds no frames")
            checked(frame)
            seconds = round(video.duration / 1e6, 3) if video.duration else None
            return frame.to_ndarray(format="rgb24"), {
                "width": frame.width,
                "height": frame.height,
                "seconds": seconds,
            }
    except (av.error.FFmpegError, ValueError) as error:
        raise Damaged(av_failure(error)) from None


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


def checked(picture: Any) -> Any:
    """`picture` itself, a frame or a codec context. Raises `Damaged` if its size is not allowed."""
    if not 0 < picture.width * picture.height <= MAX_PIXELS or max(picture.width, picture.height) > MAX_FRAME_SIDE:
        raise Damaged(
            f"{picture.width}×{picture.height} pixels, but at most {MAX_PIXELS} and sides of {MAX_FRAME_SIDE} are"
            " allowed"
        )
    return picture


def av_failure(error: Exception) -> str:
    """The text of one of PyAV's exceptions, without its number."""
    return getattr(error, "strerror", None) or reason_of(error)
