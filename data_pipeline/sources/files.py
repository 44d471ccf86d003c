"""Folders of images and of videos: a sample per file, labels from the first level of sub-folders or from a list."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from data_pipeline.decode import IMAGES, Damaged
from data_pipeline.index import VIDEOS
from data_pipeline.sources.base import Block, Entry, File, Source, class_order, failure, stem, to_json
from data_pipeline.sources.tables import Labels
from data_pipeline.storage import DataError


class Images(Source):
    kind = "images"
    title = "folder of images"
    reads: tuple[str, ...] = ("labels", "label_field")
    overhead = 3072

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in IMAGES

    def begin(self) -> None:
        self._labels: dict[str, str] = {}
        if self.options.label_field and not self.options.labels:
            raise DataError("--label-field names a column of --labels FILE, which is not given")
        if self.options.labels:
            self._from_list(Labels(self.options.labels, self.options.label_field))
        else:
            self._labels = {f.path: f.path.partition("/")[0] for f in self.files if "/" in f.path}
        self.classes = class_order(set(self._labels.values()))

    def _from_list(self, labels: Labels) -> None:
        listed = set(labels.by_path)
        without = []
        for file in self.files:
            found = labels.of(file.path)
            if found is None:
                without.append(file.path)
            else:
                listed.discard(found[0])
                self._labels[file.path] = found[1]
        self.bad += [(path, f"is listed in {labels.name}, but is not there") for path in sorted(listed)]
        if without:
            some = ", ".join(without[:5]) + (", …" if len(without) > 5 else "")
            self.notes.append(f"{len(without)} files have no row in {labels.name} and get no label: {some}")
        if not self._labels:
            example = next(iter(labels.by_path))
            raise DataError(
                f"{labels.name}: names none of the {len(self.files)} files, which are like {self.files[0].path}; "
                f"it says {example}. Write paths below the source"
            )

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        numbers = {name: i for i, name in enumerate(self.classes)}
        for file in self.files:
            label = self._labels.get(file.path)
            yield Block(file.size + self.overhead, 1, [file.path, None if label is None else numbers[label]])

    def entries(self, piece: list[Any]) -> Iterator[Entry]:
        path, label = piece
        try:
            data = self.tree.read(path)
        except OSError as error:
            yield Entry(path, reason=failure(error))
            return
        members = {File(path, 0, "").extension: data, "json": to_json({"path": path, **self.about(data)})}
        if label is not None:
            members["cls"] = str(label).encode()
        yield Entry(path, stem(path), members)

    def about(self, data: bytes) -> dict[str, Any]:
        """What else the json member says of a file."""
        return {}


class Videos(Images):
    kind = "videos"
    title = "folder of videos"

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in VIDEOS

    def begin(self) -> None:
        need_av()
        super().begin()

    def about(self, data: bytes) -> dict[str, Any]:
        try:
            return open_video(data)
        except Damaged:
            return {}  # said when the sample is checked


def need_av() -> Any:
    """PyAV, or an error that says how to get it."""
    try:
        import av
    except ImportError:
        raise DataError(
            "videos: the package that reads them is not installed; pip install 'unlabeled[video]'"
        ) from None
    return av


def open_video(data: bytes) -> dict[str, Any]:
    """{"width", "height", "seconds"} of a video whose first frame can be decoded; raises `Damaged`."""
    return first_frame(data)[1]


def first_frame(data: bytes) -> tuple[Any, dict[str, Any]]:
    """(the first frame as uint8 [H, W, 3], {"width", "height", "seconds"}); raises `Damaged`."""
    av = need_av()
    try:
        # the protocols are those of a file in memory: a playlist inside must not make it open others
        with av.open(io.BytesIO(data), options={"protocol_whitelist": ""}) as video:
            if not video.streams.video:
                raise Damaged("holds no video stream")
            frame = next(video.decode(video=0), None)
            if frame is None:
                raise Damaged("holds no frame")
            seconds = round(video.duration / 1e6, 3) if video.duration else None
            return frame.to_ndarray(format="rgb24"), {
                "width": frame.width,
                "height": frame.height,
                "seconds": seconds,
            }
    except (av.error.FFmpegError, ValueError) as error:
        raise Damaged(failure(error)) from None
