"""Rows of .csv, .tsv and .jsonl files that list other files: labels of images, and pairs of image and text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import IO, Any

from common.errors import DataError
from common.untrusted import loads
from data_pipeline.build.sources.source import (
    IMAGE_OPTIONS,
    Block,
    Entry,
    Source,
    member_of,
    stem,
    text_member,
    to_json,
)
from data_pipeline.build.sources.source_files import READ_ERRORS, File, Tree, extension, reason_of
from data_pipeline.formats.image_formats import IMAGES

LISTS = ("csv", "tsv", "jsonl", "json")
IMAGE_FIELDS = ("image_path", "image", "file_name", "filename", "path", "file", "img")
TEXT_FIELDS = ("caption", "text", "txt", "title")
LABEL_FIELDS = ("label", "class", "category", "cls")
FIELD_BYTES = 1 << 24  # the limit of a line of a list

Row = dict[str, Any]


def read_rows(tree: Tree, path: str) -> Iterator[tuple[int, Row]]:
    """(line, {field: value}) of the rows of a list. Raises DataError, which names the line with the error."""
    name = tree.full_path(path)
    if extension(path) not in LISTS:
        raise DataError(f"{name}: is not a list by its name; lists end in {', '.join(LISTS)}")
    try:
        with tree.open(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
            if extension(path) == "json" and (rows := json_array(tree, path)) is not None:
                yield from ((number, row) for number, row in enumerate(rows, 1) if isinstance(row, dict))
            elif extension(path) in ("csv", "tsv"):
                yield from _csv_rows(name, _bounded_lines(name, file))
            else:
                yield from _json_rows(name, _bounded_lines(name, file))
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except READ_ERRORS as error:
        raise DataError(f"{name}: cannot be read ({reason_of(error)})") from None


def json_array(tree: Tree, path: str) -> list[Any] | None:
    """The content of a .json file that is one array; None if its first line is an object, so that each line is one.

    Raises DataError if neither is true.
    """
    name = tree.full_path(path)
    data = tree.read(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    problem = f"{name}: holds neither an array nor an object per line"
    problem += f"; `jq -c '.[]' {name} > rows.jsonl` may convert it to lines"
    if not data.startswith(b"["):
        if json_row(data.partition(b"\n")[0])[1]:
            raise DataError(problem)
        return None
    try:
        return loads(data)
    except ValueError as error:
        raise DataError(f"{problem} ({error})") from None


def _bounded_lines(name: str, file: IO[str]) -> Iterator[str]:
    """The lines of a file. Raises DataError for a line of FIELD_BYTES or more."""
    number = 0
    while line := file.readline(FIELD_BYTES):
        number += 1
        if len(line) == FIELD_BYTES:
            raise DataError(f"{name}: line {number} is longer than {FIELD_BYTES} characters, so the file is not a list")
        yield line


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
                raise DataError(
                    f"{name}: line {reader.line_num} has {len(values)} fields, but the first line names {len(header)};"
                    " put fields that hold a separator in quotes"
                )
            yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{name}: line {reader.line_num} is not valid CSV ({error})") from None


def _json_rows(name: str, file: Iterable[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        row, reason = json_row(line)
        if reason:
            raise DataError(f"{name}: line {number} {reason}")
        yield number, row


def json_row(line: str | bytes) -> tuple[Row, str]:
    """(the JSON object in a line, ""), or ({}, the reason why the line cannot be used)."""
    try:
        row = loads(line)
    except ValueError as error:
        return {}, f"is not valid JSON ({error})"
    return (row, "") if isinstance(row, dict) else ({}, f"holds {type(row).__name__}, not a JSON object")


def has_field(row: Row, field: str) -> bool:
    """Whether a row has a field.

    `a.b` is the field b of the object in a, unless there is a field with the name `a.b`.
    """
    first, _, rest = field.partition(".")
    return field in row or (bool(rest) and isinstance(row.get(first), dict) and has_field(row[first], rest))


def pop_field(row: Row, field: str) -> Any:
    """Remove a field, which may be nested, and return its value; None if it does not exist."""
    if field in row:
        return row.pop(field)
    first, _, rest = field.partition(".")
    return pop_field(row[first], rest) if rest and isinstance(row.get(first), dict) else None


def choose_field(fields: Iterable[str], wanted: str, usual: tuple[str, ...], what: str, name: str, option: str) -> str:
    """The field for `what`: the wanted one, or the first of the usual ones that exists.

    Raises DataError, which lists the fields of the file `name`, and the option that names a field.
    """
    fields = list(fields)
    for candidate in [wanted] if wanted else usual:
        if candidate in fields:
            return candidate
    missing = f"has no field {wanted!r}" if wanted else f"has no field for {what} ({', '.join(usual)})"
    existing = ", ".join(map(str, fields)) or "none"
    raise DataError(f"{name}: {missing}; its fields: {existing}. Name one with {option}")


# ---------------------------------------------------------------- labels of images
class Labels:
    """The labels in a list whose rows have a path (or key) and a label: {path: label} in `by_path`. `fields` has the
    other fields of each row, {path: {field: value}}, without those that are empty."""

    def __init__(self, url: str, label_field: str = ""):
        tree = Tree(url)
        if not tree.single_file:
            raise DataError(f"{url}: is a folder, not a list of labels (.csv, .tsv or .jsonl)")
        self.name = url
        self.by_path: dict[str, str] = {}
        self.fields: dict[str, Row] = {}
        path_field = ""
        for line, row in read_rows(tree, tree.single_file):
            if not path_field:
                usual = ("key", *IMAGE_FIELDS, "id")
                path_field = choose_field(row, "", usual, "the path", url, "one of these names")
                label_field = choose_field(row, label_field, LABEL_FIELDS, "the label", url, "--label-field")
            path, label = str(row.pop(path_field, None) or ""), row.pop(label_field, None)
            if not path or label is None or not str(label).strip():
                raise DataError(f"{url}: line {line} has no {label_field if path else path_field}")
            path, label = path.removeprefix("./"), str(label).strip()
            if self.by_path.setdefault(path, label) != label:
                raise DataError(
                    f"{url}: line {line} gives {path} the label {label}, but it has {self.by_path[path]};"
                    " write paths below the source if several folders have files of one name"
                )
            self.fields.setdefault(path, {key: value for key, value in row.items() if key and value not in ("", None)})
        if not self.by_path:
            raise DataError(f"{url}: is an empty list")

    def of(self, path: str) -> tuple[str, str] | None:
        """(name in the list, label) of a file; None if it is not listed. The list may have its path or its name, with
        or without extension."""
        name = path.rpartition("/")[2]
        for candidate in (path, path.rpartition(".")[0], name, name.rpartition(".")[0]):
            if candidate in self.by_path:
                return candidate, self.by_path[candidate]
        return None


# ---------------------------------------------------------------- image and text
class ImageText(Source):
    """Lists of images with texts. Pieces: [line of the list, path of the image, text, other fields]."""

    kind = "image-text"
    title = "list of images and texts"
    reads = ("image_field", "text_field", *IMAGE_OPTIONS)
    overhead = 3072

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in LISTS

    @cached_property
    def files(self) -> list[File]:
        """The lists. A .json file beside other lists is an annotation of them and left out."""
        files = [file for file in self.tree.files if self.takes(file)]
        return [file for file in files if file.extension != "json"] or files

    def begin(self) -> None:
        """Read the lists, and the sizes of all images that they name."""
        self._blocks: list[Block] = []
        self._named: dict[str, File] = {}
        for file in self.files:
            fields: tuple[str, str] | None = None
            folder = file.path.rpartition("/")[0]
            for line, row in read_rows(self.tree, file.path):
                fields = fields or self._fields(row, self.tree.full_path(file.path))
                image, text = row.pop(fields[0], None), pop_field(row, fields[1])
                size = self.overhead + len(str(text)) + len(str(row))
                if isinstance(image, str) and image:
                    image = f"{folder}/{image}" if folder and not image.startswith("/") else image
                    self._named[image] = self.tree.stat(image)
                    size += self._named[image].size
                self._blocks.append(Block(size, 1, [f"{file.path}:{line}", image, text, row]))

    def _fields(self, row: Row, name: str) -> tuple[str, str]:
        image = choose_field(row, self.options.image_field, IMAGE_FIELDS, "the image's path", name, "--image-field")
        label = next((field for field in LABEL_FIELDS if field in row), None)
        if label and not self.options.text_field and not any(field in row for field in TEXT_FIELDS):
            raise DataError(
                f"{name}: has labels of images ({label}) and no texts; use it as labels of the folder of images:"
                f" unlabeled shards build IMAGES TARGET --labels {name}; or name the field of the text with"
                " --text-field"
            )

        if self.options.text_field and has_field(row, self.options.text_field):
            return image, self.options.text_field
        return image, choose_field(row, self.options.text_field, TEXT_FIELDS, "the text", name, "--text-field")

    def extra_files(self) -> list[File]:
        return [*self._named.values()]

    def unread(self) -> list[File]:
        return [file for file in self.other_files() if file.path not in self._named]

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        return iter(self._blocks)

    def entries(self, piece: list[Any]) -> Iterator[Entry]:
        where, path, text, rest = piece
        if not isinstance(path, str) or not path:
            yield Entry(where, reason="names no image")
            return
        if extension(path) not in IMAGES:
            yield Entry(f"{where} {path}", reason=f"is not an image by its name; images end in {', '.join(IMAGES)}")
            return
        caption, reason = text_member(text)
        data = b""
        if not reason:
            try:
                data = self.tree.read(path)
            except (OSError, ValueError) as error:
                reason = reason_of(error)
        if reason:
            yield Entry(f"{where} {path}", reason=reason)
            return
        annotation = to_json({"path": path, **rest})
        yield Entry(
            f"{where} {path}", stem(path), {member_of(extension(path)): data, "txt": caption, "json": annotation}
        )


def names_images(row: Row) -> bool:
    """Whether a row of a list names an image file."""
    return any(isinstance(row.get(f), str) and extension(row[f]) in IMAGES for f in IMAGE_FIELDS)
