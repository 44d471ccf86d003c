"""Parquet files as sources. They are divided by row groups and read a few rows at a time. Images are in a column of
bytes, as Hugging Face's datasets store them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.errors import Damaged, DataError
from common.untrusted import loads
from data_pipeline.build.sources.source import (
    IMAGE_OPTIONS,
    Block,
    Entry,
    Source,
    class_order,
    stem,
    text_member,
    to_json,
)
from data_pipeline.build.sources.source_files import File, Tree, reason_of
from data_pipeline.build.sources.tables import IMAGE_FIELDS, LABEL_FIELDS, choose_field

ROWS_AT_ONCE = 32  # rows in memory
_MAGIC_BYTES = {
    b"\xff\xd8": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
}


def need_pyarrow() -> Any:
    """The module pyarrow.parquet. Raises DataError that says how to install it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "the package pyarrow, which reads parquet files, is not installed; pip install 'unlabeled[parquet]'"
        ) from None
    return pyarrow.parquet


class Unreadable(DataError):
    """A parquet file that cannot be opened."""


class Table:
    """An open parquet file. Raises `Unreadable` if it cannot be opened."""

    def __init__(self, tree: Tree, path: str):
        parquet = need_pyarrow()
        self.path, self.name = path, tree.full_path(path)
        try:
            self.raw = tree.open(path)
            self.file = parquet.ParquetFile(self.raw)
        except DataError:  # of the store that holds the file
            raise
        except Exception as error:  # pyarrow raises a dozen kinds on damage
            raise Unreadable(f"{self.name}: is not a complete parquet file ({reason_of(error)})") from None
        self.schema = self.file.schema_arrow

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.raw.close()

    def blocks(self, limit: int, overhead: int) -> Iterator[Block]:
        """Blocks of about `limit` bytes or less, with pieces [path, row group, first row, last row, number of the
        group's first row in the file].
        """
        before = 0
        for group in range(self.file.metadata.num_row_groups):
            info = self.file.metadata.row_group(group)
            size, count = info.total_byte_size + overhead * info.num_rows, info.num_rows
            parts = max(1, min(count, -(-size // max(1, limit))))
            for part in range(parts):
                first, last = count * part // parts, count * (part + 1) // parts
                if last > first:
                    yield Block(size * (last - first) // count, last - first, [self.path, group, first, last, before])
            before += count

    def rows(self, group: int, first: int, last: int) -> Iterator[dict[str, Any]]:
        """Rows [first, last) of a row group. Raises `Damaged` where the file is."""
        position = 0  # of the next batch in the row group
        batches = self.file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group])
        while position < last:
            try:  # only calls of pyarrow, so that an error of our own code does not look like damage
                batch = next(batches, None)
                low, high = max(first - position, 0), min(last - position, len(batch or ()))
                rows = batch.slice(low, high - low).to_pylist() if high > low else []
            except DataError:  # of the store that holds the file
                raise
            except Exception as error:  # pyarrow raises a dozen kinds on damage
                raise Damaged(reason_of(error)) from None
            if batch is None:
                return
            yield from rows
            position += len(batch)

    def image_columns(self) -> list[str]:
        """The columns that hold bytes, or Hugging Face's {bytes, path}; columns with a usual name come first."""
        import pyarrow.types as types

        def holds_bytes(kind: Any) -> bool:
            if types.is_struct(kind):
                return kind.get_field_index("bytes") >= 0
            return types.is_binary(kind) or types.is_large_binary(kind)

        found = [field.name for field in self.schema if holds_bytes(field.type)]
        return sorted(found, key=lambda name: name not in (*IMAGE_FIELDS, "jpg", "png", "bytes"))

    def holds_images(self) -> bool:
        """Whether the image columns hold images, judged by the first values that are not null (bytes may also be text).
        True if all values are null."""
        columns = self.image_columns()
        for batch in self.file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns) if columns else ():
            values = [value for row in batch.to_pylist() for value in row.values() if value is not None]
            if values:
                return any(isinstance(value, dict) or image_extension(value) for value in values)
        return bool(columns)

    def class_names(self, column: str) -> list[str]:
        """The names of classes that Hugging Face's datasets store for a column of numbers."""
        try:
            info = loads((self.schema.metadata or {})[b"huggingface"])
            return list(info["info"]["features"][column]["names"])
        except (KeyError, TypeError, ValueError):
            return []

    def label_names(self, column: str) -> list[str]:
        """The distinct values of a column of strings; [] for a column of numbers."""
        import pyarrow.types as types

        if column not in self.schema.names:
            return []
        kind = self.schema.field(column).type
        if types.is_integer(kind) or types.is_boolean(kind) or types.is_floating(kind) or types.is_null(kind):
            return []
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_dictionary(kind)):
            raise DataError(f"{self.name}: column {column} holds {kind}, but labels are numbers or strings")
        names: set[str] = set()
        for batch in self.file.iter_batches(columns=[column]):
            names |= {str(name) for name in batch.column(0).unique().to_pylist() if name is not None}
        return sorted(names)


def survey(table: Table, limit: int, overhead: int, label: str = "") -> dict[str, Any]:
    """The result of `Source.survey` for a table, whose column `label` has the labels."""
    labels = table.label_names(label) if label else []
    return {"blocks": [list(b) for b in table.blocks(limit, overhead)], "bad": [], "labels": labels}


class ParquetImages(Source):
    """Parquet files with images. Pieces: see `Table.blocks`."""

    kind = "parquet"
    title = "images in parquet"
    reads = ("image_field", "text_field", "label_field", *IMAGE_OPTIONS)
    overhead = 3072

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension == "parquet"

    def begin(self) -> None:
        with first_readable(self) as table:
            self.classes = table.class_names(self._columns(table)[1])

    def files_to_survey(self) -> list[str]:
        return [file.path for file in self.files]

    def survey(self, path: str) -> dict[str, Any]:
        try:
            table = Table(self.tree, path)
        except DataError as error:
            return {"blocks": [], "bad": [[path, str(error).partition(": ")[2]]], "labels": []}
        with table:
            return survey(table, self.limit, self.overhead, self._columns(table)[1])

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        names = {name for file in self.files for name in surveys[file.path]["labels"]}
        if names:
            self.classes = class_order(names)
        return super().blocks(surveys)

    def _columns(self, table: Table) -> tuple[str, str, str]:
        """The columns (image, label or "", text or "")."""
        options, found = self.options, table.image_columns()
        image = (
            choose_field(found, options.image_field, (), "", table.name, "--image-field") if options.image_field else ""
        )
        if not image and not found:
            names = ", ".join(table.schema.names)
            raise DataError(f"{table.name}: has no column of image bytes; its columns are {names}")
        if not image and len(found) > 1 and found[0] not in (*IMAGE_FIELDS, "jpg", "png", "bytes"):
            raise DataError(
                f"{table.name}: has several columns of bytes: {', '.join(found)}; name one with --image-field"
            )
        label = text = ""
        if options.label_field:
            label = choose_field(table.schema.names, options.label_field, (), "", table.name, "--label-field")
        else:
            label = next((name for name in LABEL_FIELDS if name in table.schema.names), "")
        if options.text_field:
            text = choose_field(table.schema.names, options.text_field, (), "", table.name, "--text-field")
        return image or found[0], label, text

    def entries(self, piece: list[Any]) -> Iterator[Entry]:
        path, group, first, last, before = piece
        done = first
        try:
            with Table(self.tree, path) as table:
                columns = self._columns(table)
                for row in table.rows(group, first, last):
                    yield self._entry(f"{path}:{before + done}", path, row, *columns)
                    done += 1
        except (Damaged, DataError) as error:  # the rest of these rows is lost
            yield from (Entry(f"{path}:{before + row}", reason=reason_of(error)) for row in range(done, last))

    def _entry(self, where: str, path: str, row: dict[str, Any], image: str, label: str, text: str) -> Entry:
        cell, value = row.pop(image), row.pop(label, None) if label else None
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not data:
            return Entry(where, reason="holds no image bytes")
        image_path = (cell.get("path") if isinstance(cell, dict) else None) or ""
        extension = image_extension(data)
        if not extension:
            return Entry(where, reason="its bytes are not of an image format that is read")
        members = {extension: data}
        if text:
            members["txt"], reason = text_member(row.pop(text))
            if reason:
                return Entry(where, reason=reason)
        if value is not None and value == value:  # NaN, which stands for a missing number, is not equal to itself
            if isinstance(value, float) and not value.is_integer():
                return Entry(where, reason=f"its label is {value}, but labels are whole numbers or strings")
            members["cls"] = str(self._number(value)).encode()
        members["json"] = to_json({"path": image_path or where, **row})
        return Entry(where, stem(image_path or path), members)

    def _number(self, value: Any) -> int:
        return self._numbers[value] if isinstance(value, str) else int(value)

    @property
    def _numbers(self) -> dict[str, int]:
        if not hasattr(self, "_class_numbers"):
            self._class_numbers = {name: i for i, name in enumerate(self.classes)}
        return self._class_numbers


def first_readable(source: Source) -> Table:
    """The first parquet file that can be opened. Raises the error of the first file if there is none."""
    errors: list[DataError] = []
    for file in source.files:
        if file.extension == "parquet":
            try:
                return Table(source.tree, file.path)
            except DataError as error:
                errors.append(error)
    raise errors[0]


def image_extension(data: bytes) -> str:
    """The extension for the bytes of an image; "" if their format is not known."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in _MAGIC_BYTES.items() if data.startswith(start)), "")
