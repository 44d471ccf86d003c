"""Rows of .csv, .tsv and .jsonl files that list other files: labels of images, and pairs of image and text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from data_pipeline.decode import IMAGES
from data_pipeline.sources.base import Block, Entry, File, Source, Tree, extension, failure, stem, text_member, to_json
from data_pipeline.storage import DataError

LISTS = ("csv", "tsv", "jsonl")
IMAGE_FIELDS = ("image_path", "image", "file_name", "filename", "path", "file", "img")
TEXT_FIELDS = ("caption", "text", "txt", "title")
LABEL_FIELDS = ("label", "class", "category", "cls")
FIELD_BYTES = 1 << 24  # the longest field of a .csv that is read

Row = dict[str, Any]


def read_rows(tree: Tree, path: str) -> Iterator[tuple[int, Row]]:
    """(line, {field: value}) of a list. Raises DataError with the line where it is no such list."""
    name = tree.place(path)
    if extension(path) not in LISTS:
        raise DataError(f"{name}: is no list; lists end in {', '.join(LISTS)}")
    try:
        with tree.open(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
            yield from _json_rows(name, file) if extension(path) == "jsonl" else _csv_rows(name, file)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({failure(error)})") from None


def _csv_rows(name: str, file: Iterable[str]) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(FIELD_BYTES)
    reader = csv.reader(file, delimiter="\t" if extension(name) == "tsv" else ",", strict=True)
    header: list[str] = []
    try:
        for values in reader:
            if not values:
                continue
            if not header:
                header = [value.strip() for value in values]
                if len(set(header)) < len(header):
                    raise DataError(f"{name}: names a column twice in its first line: {', '.join(header)}")
                continue
            if len(values) != len(header):
                many = f"{len(values)} fields, but the first line names {len(header)}"
                raise DataError(
                    f"{name}: line {reader.line_num} has {many}; put fields that hold a separator in quotes"
                )
            yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{name}: line {reader.line_num} is no CSV ({error})") from None


def _json_rows(name: str, file: Iterable[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        row, reason = json_row(line)
        if reason:
            raise DataError(f"{name}: line {number} {reason}")
        yield number, row


def json_row(line: str | bytes) -> tuple[Row, str]:
    """(the object in a line, why it cannot be used or "")."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"is no JSON ({error})"
    return (row, "") if isinstance(row, dict) else ({}, f"holds no JSON object but {type(row).__name__}")


def pick(fields: Iterable[str], wanted: str, usual: tuple[str, ...], what: str, name: str, option: str) -> str:
    """The field for `what`: the wanted one, or the first usual one that is there. Raises DataError naming what there is."""
    fields = list(fields)
    for candidate in [wanted] if wanted else usual:
        if candidate in fields:
            return candidate
    missing = f"has no field {wanted!r}" if wanted else f"has no field for {what} ({', '.join(usual)})"
    there = ", ".join(map(str, fields)) or "none"
    raise DataError(f"{name}: {missing}; its fields: {there}. Name one with {option}")


# ---------------------------------------------------------------- labels of images
class Labels:
    """Labels by path from a list with the fields path (or key) and label."""

    def __init__(self, url: str, label_field: str = ""):
        tree = Tree(url)
        if not tree.only:
            raise DataError(f"{url}: is a folder, not a list of labels (.csv, .tsv or .jsonl)")
        self.name = url
        self.by_path: dict[str, str] = {}
        path_field = ""
        for line, row in read_rows(tree, tree.only):
            if not path_field:
                usual = ("key", *IMAGE_FIELDS, "id")
                path_field = pick(row, "", usual, "the path", url, "one of these names")
                label_field = pick(row, label_field, LABEL_FIELDS, "the label", url, "--label-field")
            path, label = str(row.get(path_field) or ""), row.get(label_field)
            if not path or label is None or not str(label).strip():
                raise DataError(f"{url}: line {line} has no {label_field if path else path_field}")
            path, label = path.removeprefix("./"), str(label).strip()
            if self.by_path.setdefault(path, label) != label:
                raise DataError(f"{url}: line {line} gives {path} the label {label}, but it has {self.by_path[path]}")
        if not self.by_path:
            raise DataError(f"{url}: lists nothing")

    def of(self, path: str) -> tuple[str, str] | None:
        """(how the list names it, label) of a file: by its path, its name, or either without extension."""
        name = path.rpartition("/")[2]
        for candidate in (path, path.rpartition(".")[0], name, name.rpartition(".")[0]):
            if candidate in self.by_path:
                return candidate, self.by_path[candidate]
        return None


# ---------------------------------------------------------------- image and text
class ImageText(Source):
    kind = "image-text"
    title = "list of images and texts"
    reads = ("image_field", "text_field")
    overhead = 3072

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in LISTS

    def begin(self) -> None:
        """Read the lists, and look for every image that they name."""
        self._blocks: list[Block] = []
        self._named: dict[str, File] = {}
        for file in self.files:
            fields: tuple[str, str] | None = None
            folder = file.path.rpartition("/")[0]
            for line, row in read_rows(self.tree, file.path):
                fields = fields or self._fields(row, self.tree.place(file.path))
                image, text = row.pop(fields[0], None), row.pop(fields[1], None)
                size = self.overhead + len(str(text)) + len(str(row))
                if isinstance(image, str) and image:
                    image = f"{folder}/{image}" if folder and not image.startswith("/") else image
                    self._named[image] = self.tree.stat(image)
                    size += self._named[image].size
                self._blocks.append(Block(size, 1, [f"{file.path}:{line}", image, text, row]))

    def _fields(self, row: Row, name: str) -> tuple[str, str]:
        image = pick(row, self.options.image_field, IMAGE_FIELDS, "the image's path", name, "--image-field")
        return image, pick(row, self.options.text_field, TEXT_FIELDS, "the text", name, "--text-field")

    def read_too(self) -> list[File]:
        return [*self._named.values()]

    def unread(self) -> list[File]:
        return [file for file in self.others() if file.path not in self._named]

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        return iter(self._blocks)

    def entries(self, piece: list[Any]) -> Iterator[Entry]:
        where, path, text, rest = piece
        if not isinstance(path, str) or not path:
            yield Entry(where, reason="names no image")
            return
        if extension(path) not in IMAGES:
            yield Entry(f"{where} {path}", reason=f"is no image by its name; those end in {', '.join(IMAGES)}")
            return
        caption, reason = text_member(text)
        data = b""
        if not reason:
            try:
                data = self.tree.read(path)
            except (OSError, ValueError) as error:
                reason = failure(error)
        if reason:
            yield Entry(f"{where} {path}", reason=reason)
            return
        about = to_json({"path": path, **rest})
        yield Entry(f"{where} {path}", stem(path), {extension(path): data, "txt": caption, "json": about})


def names_images(row: Row) -> bool:
    """Whether a row of a list points to an image file."""
    return any(isinstance(row.get(f), str) and extension(row[f]) in IMAGES for f in IMAGE_FIELDS)
