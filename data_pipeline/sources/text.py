"""Text: .jsonl rows, .parquet rows, and .txt files that are a document each or hold one per line."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from data_pipeline.sources.base import Block, Entry, File, Source, failure, stem, text_member, to_json
from data_pipeline.sources.parquet import Table, survey
from data_pipeline.sources.tables import TEXT_FIELDS, json_row, pick
from data_pipeline.storage import DataError

TABLES = ("jsonl", "parquet")
TEXT_NAMES = ("text", *(name for name in TEXT_FIELDS if name != "text"), "content")


class Text(Source):
    kind = "text"
    title = "text"
    reads = ("text_field", "lines")

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in ("txt", *TABLES)

    @cached_property
    def files(self) -> list[File]:
        """Tables where there are any: a .txt beside them is a note on them."""
        files = [file for file in self.tree.files if self.takes(file)]
        return [file for file in files if file.extension in TABLES] or files

    def begin(self) -> None:
        tables = [file for file in self.files if file.extension in TABLES]
        if tables and self.options.lines:
            raise DataError(f"--lines is for .txt files, but {tables[0].path} has a text per row already")
        if not tables and self.options.text_field:
            raise DataError("--text-field is for .jsonl and .parquet files, but the source holds only .txt")
        for file in tables:
            if file.extension == "jsonl":
                self._check_first_row(file.path)

    def _check_first_row(self, path: str) -> None:
        try:
            with self.tree.open(path) as file:
                row, reason = json_row(file.readline())
        except OSError as error:
            raise DataError(f"{self.tree.place(path)}: cannot be read ({failure(error)})") from None
        if not reason:
            self._field(row, self.tree.place(path))

    def _field(self, fields: Any, name: str) -> str:
        return pick(fields, self.options.text_field, TEXT_NAMES, "the text", name, "--text-field")

    def looked_into(self) -> list[str]:
        return [file.path for file in self.files if self.options.lines or file.extension in TABLES]

    def survey(self, path: str) -> dict[str, Any]:
        try:
            if path.lower().endswith(".parquet"):
                table = Table(self.tree, path)
            else:
                return {"blocks": [list(block) for block in self._cut(path)], "bad": [], "labels": []}
        except DataError as error:
            return {"blocks": [], "bad": [[path, str(error).partition(": ")[2]]], "labels": []}
        except OSError as error:
            return {"blocks": [], "bad": [[path, failure(error)]], "labels": []}
        with table:
            self._field(table.schema.names, table.name)
            return survey(table, self.limit, self.overhead)

    def _cut(self, path: str) -> Iterator[Block]:
        """A file of lines in pieces [path, first byte, last byte, first line]."""
        begin = end = rows = line = 0
        with self.tree.open(path) as file:
            for text in file:
                size = end - begin + rows * self.overhead
                if rows and size + len(text) + self.overhead > self.limit:
                    yield Block(size, rows, [path, begin, end, line])
                    begin, rows, line = end, 0, line + rows
                end += len(text)
                rows += 1
        if rows:
            yield Block(end - begin + rows * self.overhead, rows, [path, begin, end, line])

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        for file in self.files:
            if file.path in surveys:
                yield from (Block(*block) for block in surveys[file.path]["blocks"])
            else:
                yield Block(file.size + self.overhead, 1, [file.path])

    def entries(self, piece: list[Any]) -> Iterator[Entry | None]:
        path = piece[0]
        if len(piece) == 1:
            yield self._document(path)
        elif path.lower().endswith(".parquet"):
            yield from self._table_rows(*piece)
        else:
            yield from self._line_rows(*piece)

    def _document(self, path: str) -> Entry:
        try:
            text = self.tree.read(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Entry(path, reason=f"is not UTF-8 ({error.reason} at byte {error.start})")
        except OSError as error:
            return Entry(path, reason=failure(error))
        data, reason = text_member(text)
        return (
            Entry(path, reason=reason)
            if reason
            else Entry(path, stem(path), {"txt": data, "json": to_json({"path": path})})
        )

    def _line_rows(self, path: str, begin: int, end: int, line: int) -> Iterator[Entry | None]:
        with self.tree.open(path) as file:
            file.seek(begin)
            while file.tell() < end:
                data, line = file.readline(), line + 1
                if line == 1:
                    data = data.removeprefix(b"\xef\xbb\xbf")
                yield self._line(f"{path}:{line}", path, data) if data.strip() else None

    def _line(self, where: str, path: str, data: bytes) -> Entry:
        rest: dict[str, Any] = {}
        try:
            text: Any = data.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            return Entry(where, reason=f"is not UTF-8 ({error.reason} at byte {error.start} of the line)")
        if path.lower().endswith(".jsonl"):
            rest, reason = json_row(text)
            if reason:
                return Entry(where, reason=reason)
            text = rest.pop(self._present(rest), None)
        return _entry(where, path, text, rest)

    def _table_rows(self, path: str, group: int, first: int, last: int, before: int) -> Iterator[Entry]:
        done = first
        try:
            with Table(self.tree, path) as table:
                field = self._field(table.schema.names, table.name)
                for row in table.rows(group, first, last):
                    yield _entry(f"{path}:{before + done}", path, row.pop(field), row)
                    done += 1
        except Exception as error:  # pyarrow raises a dozen kinds on damage; the rest of these rows is lost
            yield from (Entry(f"{path}:{before + row}", reason=failure(error)) for row in range(done, last))

    def _present(self, row: dict[str, Any]) -> str:
        if self.options.text_field:
            return self.options.text_field
        return next((name for name in TEXT_NAMES if name in row), "text")


def _entry(where: str, path: str, text: Any, rest: dict[str, Any]) -> Entry:
    data, reason = text_member(text)
    if reason:
        return Entry(where, reason=reason)
    return Entry(where, stem(path), {"txt": data, **({"json": to_json(rest)} if rest else {})})
