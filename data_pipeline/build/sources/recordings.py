"""A source of recordings: a folder of audio files, or a list (.csv, .tsv, .jsonl) that names them, with labels and
texts if it has such columns. Each recording becomes a sample, or several if it is longer than `--seconds`.

Recordings that are cut are surveyed first: they are decoded to count their samples. A recording of T samples is divided
into the smallest number of equal pieces that are not too long. A worker decodes it again and stores the pieces as FLAC.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from common.errors import Damaged, DataError
from data_pipeline.build.sources.media_folders import Images
from data_pipeline.build.sources.source import Block, Entry, Options, class_order, stem, text_member, to_json
from data_pipeline.build.sources.source_files import READ_ERRORS, File, extension, reason_of
from data_pipeline.build.sources.tables import LABEL_FIELDS, TEXT_FIELDS, Row, choose_field, pop_field, read_rows
from data_pipeline.formats.av_files import need_av
from data_pipeline.formats.waveforms import flac, pieces
from data_pipeline.shards.members import AUDIO

AUDIO_FIELDS = ("audio_filepath", "audio_path", "audio", "wav", "path", "file", "file_name", "filename")
SPOKEN_FIELDS = ("sentence", "transcript", "transcription", *TEXT_FIELDS)
LISTS = ("csv", "tsv", "jsonl")
FLAC_BYTES = 1.2  # approximate bytes of a sample in a FLAC file
MIN_SECONDS = 0.1


def check_seconds(options: Options) -> None:
    """Raise DataError if `seconds` is not a valid length of recordings."""
    seconds = options.seconds
    if seconds is not None and not (math.isfinite(seconds) and seconds >= MIN_SECONDS):
        raise DataError(f"--seconds {seconds:g}: write the length of the longest recording, at least {MIN_SECONDS:g}")


def names_recordings(row: Row) -> bool:
    """Whether a row of a list names an audio file."""
    return any(isinstance(row.get(f), str) and extension(row[f]) in AUDIO for f in AUDIO_FIELDS)


class Recordings(Images):
    """Pieces: [path, class number or None, other fields of the list's row, None or [number of pieces that the recording
    is divided into, its samples, first piece, last piece + 1]]."""

    kind = "audio"
    title = "folder or list of recordings"
    reads = ("labels", "label_field", "text_field", "seconds")
    overhead = 2048

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in AUDIO

    @cached_property
    def _rows(self) -> dict[str, Row]:
        """{path: the other fields of its row} of a list; {} for a folder."""
        rows: dict[str, Row] = {}
        if extension(self.tree.single_file) in LISTS:
            name = self.tree.full_path(self.tree.single_file)
            field = ""
            for line, row in read_rows(self.tree, self.tree.single_file):
                field = field or choose_field(row, "", AUDIO_FIELDS, "the recording's path", name, "one of these names")
                path = row.pop(field, None)
                if not isinstance(path, str) or extension(path) not in AUDIO:
                    self.bad.append((f"{self.tree.single_file}:{line}", f"names no recording in {field}"))
                elif path in rows:
                    self.bad.append((f"{self.tree.single_file}:{line}", f"names {path}, which an earlier row names"))
                else:
                    rows[path] = row
        return rows

    @cached_property
    def files(self) -> list[File]:
        if extension(self.tree.single_file) in LISTS:
            return [self.tree.stat(path) for path in self._rows]
        return [file for file in self.tree.files if self.takes(file)]

    def extra_files(self) -> list[File]:
        return [self.tree.stat(self.tree.single_file)] if self._rows else []

    def unread(self) -> list[File]:
        return [] if self._rows else super().unread()

    def begin(self) -> None:
        need_av()
        if not self._rows:
            return super().begin()
        first = next(iter(self._rows.values()))
        wanted = self.options.label_field
        field = wanted or next((name for name in LABEL_FIELDS if name in first), "")
        if wanted and wanted not in first:
            raise DataError(f"{self.tree.url}: has no field {wanted!r}; its fields: {', '.join(first) or 'none'}")
        labels = {path: row.get(field) for path, row in self._rows.items()} if field else {}
        self._labels = {path: str(label) for path, label in labels.items() if label is not None}
        self._fields = self._rows
        self.classes = class_order(set(self._labels.values()))

    def files_to_survey(self) -> list[str]:
        return [file.path for file in self.files] if self.options.seconds else []

    def survey(self, path: str) -> dict[str, Any]:
        """Count the samples of a recording, and divide it if it is too long; see `Source.survey`. Here the piece of a
        block is only its last entry."""
        rate = total = 0
        try:
            with self.tree.open(path) as file:
                for found_rate, samples in pieces(file):
                    rate, total = found_rate, total + len(samples)
        except (Damaged, *READ_ERRORS) as reason:
            return {"blocks": [], "bad": [[path, reason_of(reason)]]}
        count = math.ceil(total / (rate * float(self.options.seconds or 0)))
        if count == 1:
            return {"blocks": [[self.tree.stat(path).size + self.overhead, 1, None]], "bad": []}
        size = int(total / count * FLAC_BYTES) + self.overhead
        per_block = max(1, self.limit // size)
        spans = [(first, min(count, first + per_block)) for first in range(0, count, per_block)]
        return {"blocks": [[(b - a) * size, b - a, [count, total, a, b]] for a, b in spans], "bad": []}

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        for file in self.files:
            whole = {"blocks": [[file.size + self.overhead, 1, None]]}
            for size, rows, span in surveys.get(file.path, whole)["blocks"]:
                yield Block(size, rows, [file.path, *self._stated(file.path), span])

    def entries(self, piece: list[Any]) -> Iterator[Entry | None]:
        path, label, row, span = piece
        more, fields = self._further_members(dict(row), label)
        if span is None:
            try:
                yield Entry(path, stem(path), {extension(path): self.tree.read(path), **more(fields | {"path": path})})
            except OSError as error:
                yield Entry(path, reason=reason_of(error))
            return
        count, total, first, last = span
        number = first
        try:
            with self.tree.open(path) as file:
                for number, rate, samples in _divided(pieces(file), count, total, first, last):
                    begin = number * total // count / rate
                    facts = {"path": path, "begin": round(begin, 3), "seconds": round(len(samples) / rate, 3)}
                    members = {"flac": flac(samples, rate), **more(fields | facts)}
                    yield Entry(f"{path} at {begin:.3f} s", f"{stem(path)}-{number:05d}", members)
                    number += 1
            reason = "it became shorter while it was read"
        except (Damaged, *READ_ERRORS) as error:
            reason = reason_of(error)
        if number < last:
            yield Entry(path, reason=f"{last - number} of its pieces are left out: {reason}")
            yield from [None] * (last - number - 1)

    def _further_members(self, row: Row, label: int | None) -> tuple[Any, Row]:
        """(a function that makes the members beside the recording from the fields of the json member, the fields of the
        row for it)."""
        wanted = self.options.text_field
        field = wanted or next((name for name in SPOKEN_FIELDS if name in row), "")
        text, problem = text_member(pop_field(row, field)) if field else (b"", "no text")

        def members(fields: Row) -> dict[str, bytes]:
            out = {} if problem else {"txt": text}
            out |= {} if label is None else {"cls": str(label).encode()}
            return out | {"json": to_json(fields)}

        return members, row


def _divided(
    parts: Iterator[tuple[int, np.ndarray]], count: int, total: int, first: int, last: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(number, rate, samples) of the pieces [first, last) of a recording of `total` samples that is divided into
    `count`. `parts`: its decoded samples."""
    held, start, number = np.zeros(0, np.int16), 0, first  # `start`: the position of held[0] in the recording
    for rate, samples in parts:
        held = np.concatenate([held, samples])
        while number < last and start + len(held) >= (end := (number + 1) * total // count):
            begin = number * total // count
            yield number, rate, held[begin - start : end - start]
            held, start, number = held[end - start :], end, number + 1
        if number == last:
            return
        skipped = min(len(held), max(0, number * total // count - start))
        held, start = held[skipped:], start + skipped
