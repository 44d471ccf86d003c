"""Text as a source: the rows of .jsonl, .json and .parquet files, or .txt files (any text files, with `--kind text`). A
.txt file is a document, or has a document in each line, or documents between separators.
"""

from __future__ import annotations

import errno
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import IO, Any

from common.errors import Damaged, DataError
from common.untrusted import lines
from data_pipeline.build.sources.parquet import Table, Unreadable, survey
from data_pipeline.build.sources.source import Block, Entry, Source, stem, text_member, to_json
from data_pipeline.build.sources.source_files import READ_ERRORS, File, extension, reason_of
from data_pipeline.build.sources.tables import choose_field, has_field, json_array, json_row, pop_field
from data_pipeline.formats.image_formats import IMAGES
from data_pipeline.shards.members import MAX_MEMBER_BYTES, VIDEOS

TABLES = ("jsonl", "parquet")
READ_BYTES = 1 << 20  # bytes of a file with separators that are read at a time
BYTE_ORDER_MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_JSON = 'python -c "import json,sys; {}" < {{path}} > {{path}}.jsonl'
# commands that convert other data to text, by the extension of a file or the name of a field
CONVERT = {
    "arrow": (
        "python -c \"import pyarrow as a, pyarrow.parquet as q; q.write_table(a.ipc.open_stream('{path}').read_all(),"
        " '{path}.parquet')\""
    ),
    "wet": _JSON.format(
        "from warcio.archiveiterator import ArchiveIterator as A;"
        " [print(json.dumps({{'text': r.content_stream().read().decode('utf-8', 'replace')}})) for r in"
        " A(sys.stdin.buffer) if r.rec_type == 'conversion']"
    )
    + "   (pip install warcio)",
    "messages": _JSON.format(
        "[print(json.dumps({{'text': '\\n'.join(m['role'] + ': ' + m['content'] for m in"
        " json.loads(line)['messages'])}})) for line in sys.stdin]"
    ),
    "conversations": _JSON.format(
        "[print(json.dumps({{'text': '\\n'.join(m['from'] + ': ' + m['value'] for m in"
        " json.loads(line)['conversations'])}})) for line in sys.stdin]"
    ),
}
TEXT_NAMES = ("text", "content", "txt", "caption", "title")  # usual names of the field with the text, in this order
DECIDING_ROWS = 100  # the text is the first of TEXT_NAMES that one of these rows has
MAX_SEARCHED_ROWS = 10_000  # rows that are searched if none of those has such a field
# Extensions that are not read as text even with `--kind text`.
NOT_TEXT = (*IMAGES, *VIDEOS, "npy", "tar", "tgz", "gz", "zst", "zip", "pdf")


class Text(Source):
    """Text files and tables. Pieces: [path] for a file that is one document; for others, see `_cut`, `_cut_array` and
    `Table.blocks`."""

    kind = "text"
    title = "text"
    reads = ("text_field", "lines", "separator")

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in ("txt", "json", *TABLES)

    @cached_property
    def files(self) -> list[File]:
        """Tables if there are any (a .txt file beside them is an annotation); otherwise .txt files, or any text files
        with `--kind text`; otherwise .json files.
        """
        found = self.tree.files
        tables = [file for file in found if file.extension in TABLES]
        other_endings = (*NOT_TEXT, "json")
        texts = [f for f in found if f.extension == "txt" or (self.kind_given and f.extension not in other_endings)]
        return tables or texts or [file for file in found if file.extension == "json"]

    def begin(self) -> None:
        rows = [file for file in self.files if file.extension in (*TABLES, "json")]
        for flag in ("lines", "separator"):
            if rows and getattr(self.options, flag):
                raise DataError(f"--{flag} is for .txt files, but {rows[0].path} has one text per row")
        if self.options.lines and self.options.separator:
            raise DataError("--lines and --separator: write only one of them")
        if not rows and self.options.text_field:
            raise DataError("--text-field is for .jsonl and .parquet files, but the source holds only .txt")

    def _field(self, fields: Any, name: str) -> str:
        """The field of the text among the fields of the file `name`. Raises DataError."""
        wanted = self.options.text_field
        if wanted and wanted not in fields and wanted.partition(".")[0] in fields:
            return wanted  # a field of a nested object
        return choose_field(fields, wanted, TEXT_NAMES, "the text", name, "--text-field")

    def _field_of_rows(self, rows: Iterable[Any], name: str) -> str:
        """The field of the text, from the first rows of the file `name`, some of which may lack the field.

        Raises DataError if no row has such a field.
        """
        wanted = self.options.text_field
        names, nested = dict[str, None](), list[str]()  # the fields of all rows; texts of objects in the first such row
        for number, row in enumerate(itertools.islice(rows, MAX_SEARCHED_ROWS), 1):
            if not isinstance(row, dict) or not row:
                continue
            if wanted and has_field(row, wanted):
                return wanted
            names |= dict.fromkeys(row)
            nested = nested or [
                f"{k}.{n}" for k, part in row.items() if isinstance(part, dict) for n in TEXT_NAMES if n in part
            ]
            if not wanted and number >= DECIDING_ROWS and names.keys() & {*TEXT_NAMES}:
                break
        if not names:
            return wanted or TEXT_NAMES[0]
        try:
            return choose_field(names, wanted, TEXT_NAMES, "the text", name, "--text-field")
        except DataError as error:
            chat = next((field for field in ("messages", "conversations") if field in names), None)
            if not wanted and nested:
                raise DataError(f"{error}, for example --text-field {nested[0]}") from None
            if not wanted and chat:
                line = CONVERT[chat].format(path=name)
                raise DataError(f"{error}; or convert {chat} to text, and then build {name}.jsonl: {line}") from None
            raise

    def files_to_survey(self) -> list[str]:
        several_documents = self.options.lines or self.options.separator
        return [file.path for file in self.files if several_documents or file.extension in (*TABLES, "json")]

    def survey(self, path: str) -> dict[str, Any]:
        kind, name = extension(path), self.tree.full_path(path)
        try:
            if kind == "parquet":
                with Table(self.tree, path) as table:
                    field = self._field(table.schema.names, table.name)
                    return {**survey(table, self.limit, self.overhead), "field": field}
            if kind == "json" and (rows := json_array(self.tree, path)) is not None:
                field = self._field_of_rows(rows, name)
                return {"blocks": [*map(list, self._cut_array(path, rows, field))], "bad": [], "field": field}
            field = ""
            if kind in ("jsonl", "json"):
                with self.tree.open(path) as file:
                    field = self._field_of_rows((json_row(line)[0] for line in file), name)
            return {"blocks": [list(block) for block in self._cut(path, field)], "bad": [], "field": field}
        except Unreadable as error:
            return {"blocks": [], "bad": [[path, str(error).partition(": ")[2]]], "field": ""}
        except READ_ERRORS as error:
            return {"blocks": [], "bad": [[path, reason_of(error)]], "field": ""}

    def _cut_array(self, path: str, rows: list[Any], field: str) -> Iterator[Block]:
        """The blocks of a JSON array, with pieces [path, first row, end row, -1, field of the text]."""
        total = len(json.dumps(rows)) + self.overhead * len(rows)
        rows_per_block = max(1, self.limit * len(rows) // max(1, total))
        for first in range(0, len(rows), rows_per_block):
            end = min(len(rows), first + rows_per_block)
            yield Block((end - first) * self.limit // rows_per_block, end - first, [path, first, end, -1, field])

    def _cut(self, path: str, field: str) -> Iterator[Block]:
        """The blocks of a file of lines or of separated documents, with pieces [path, first byte, end byte, first line,
        field of the text].
        """
        begin = end = rows = line = 0
        with self.tree.open(path) as file:
            for _, length in self._parts(path, file):
                size = end - begin + rows * self.overhead
                if rows and size + length + self.overhead > self.limit:
                    yield Block(size, rows, [path, begin, end, line, field])
                    begin, rows, line = end, 0, line + rows
                end += length
                rows += 1
        if rows:
            yield Block(end - begin + rows * self.overhead, rows, [path, begin, end, line, field])

    def _parts(self, path: str, file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
        """(line, its bytes in the file) of the lines from the current position on; with --separator, the same of the
        documents, each with the separator after it."""
        if (extension(path) != "txt" and not self.kind_given) or not self.options.separator:
            yield from lines(file, MAX_MEMBER_BYTES)
            return
        separator, buffered, searched = self.options.separator.encode(), b"", 0
        while chunk := file.read(READ_BYTES):
            buffered += chunk
            while (found := buffered.find(separator, searched)) >= 0:
                end = found + len(separator)
                yield buffered[:end], end
                buffered, searched = buffered[end:], 0
            searched = max(0, len(buffered) - len(separator) + 1)
            if len(buffered) > MAX_MEMBER_BYTES:
                raise OSError(
                    f"no separator in {len(buffered)} bytes, but {MAX_MEMBER_BYTES} are allowed for a document"
                )
        if buffered:
            yield buffered, len(buffered)

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        fields = Counter(answer["field"] for answer in surveys.values() if answer["field"])
        if fields and not self.options.text_field and set(fields) != {"text"}:
            used = ", ".join(f"{field} (of {count} files)" for field, count in fields.most_common())
            self.notes.append(f"the text is the field {used}; --text-field NAME chooses another")
        for file in self.files:
            if file.path in surveys:
                yield from (Block(*block) for block in surveys[file.path]["blocks"])
            else:
                yield Block(file.size + self.overhead, 1, [file.path])

    def entries(self, piece: list[Any]) -> Iterator[Entry | None]:
        path = piece[0]
        if len(piece) == 1:
            yield self._document(path)
        elif extension(path) == "parquet":
            yield from self._table_rows(*piece)
        else:
            yield from self._line_rows(*piece)

    def _document(self, path: str) -> Entry:
        try:
            data = self.tree.read(path)
            text = data.decode(_bom_encoding(data) or "utf-8-sig")
        except UnicodeDecodeError as error:
            encoding = _bom_encoding(data).upper() or "UTF-8"
            return Entry(path, reason=f"is not {encoding} ({error.reason} at byte {error.start})")
        except READ_ERRORS as error:
            too_large = isinstance(error, OSError) and error.errno == errno.EFBIG
            advice = " in a document; write --lines or --separator TEXT" if too_large else ""
            return Entry(path, reason=reason_of(error) + advice)
        data, reason = text_member(text)
        if reason:
            return Entry(path, reason=reason)
        return Entry(path, stem(path), {"txt": data, "json": to_json({"path": path})})

    def _line_rows(self, path: str, begin: int, end: int, line: int, field: str) -> Iterator[Entry | None]:
        """The rows of a piece of `_cut`, or of `_cut_array`, for which `line` is −1."""
        if line < 0:
            for number, row in enumerate((json_array(self.tree, path) or [])[begin:end], begin + 1):
                where = f"{path}:{number}"
                if isinstance(row, dict):
                    yield _entry(where, path, pop_field(row, field), row)
                else:
                    yield Entry(where, reason=f"holds {type(row).__name__}, not a JSON object")
            return
        with self.tree.open(path) as file:
            file.seek(begin)
            for data, size in self._parts(path, file):
                begin, line = begin + size, line + 1
                if line == 1:
                    data = data.removeprefix(b"\xef\xbb\xbf")
                data = data.removesuffix(self.options.separator.encode())
                if size > MAX_MEMBER_BYTES:
                    yield Entry(
                        f"{path}:{line}", reason=f"holds {size} bytes, but at most {MAX_MEMBER_BYTES} are allowed"
                    )
                else:
                    yield self._line(f"{path}:{line}", path, data, field) if data.strip() else None
                if begin >= end:
                    return

    def _line(self, where: str, path: str, data: bytes, field: str) -> Entry:
        """The entry for a line, or for a document between separators. `field`: of the text in a JSON object, or ""."""
        rest: dict[str, Any] = {}
        try:
            text: Any = data.decode().rstrip("\r\n")
            if self.options.separator:
                text = text.lstrip("\r\n")
        except UnicodeDecodeError as error:
            if encoding := _bom_encoding(data):
                return Entry(where, reason=f"is {encoding.upper()}; {_to_utf8(encoding, path)}")
            return Entry(where, reason=f"is not UTF-8 ({error.reason} at byte {error.start} of the line)")
        if field:
            rest, reason = json_row(text)
            if reason:
                return Entry(where, reason=reason)
            text = pop_field(rest, field)
        return _entry(where, path, text, rest)

    def _table_rows(self, path: str, group: int, first: int, last: int, before: int) -> Iterator[Entry]:
        done = first
        try:
            with Table(self.tree, path) as table:
                field = self._field(table.schema.names, table.name)
                for row in table.rows(group, first, last):
                    yield _entry(f"{path}:{before + done}", path, pop_field(row, field), row)
                    done += 1
        except (Damaged, DataError) as error:  # the rest of these rows is lost
            yield from (Entry(f"{path}:{before + row}", reason=reason_of(error)) for row in range(done, last))


def _bom_encoding(data: bytes) -> str:
    """The encoding that a byte order mark gives; "" for UTF-8, or without a mark."""
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS if data.startswith(mark)), "")


def _to_utf8(encoding: str, path: str) -> str:
    return f"write it as UTF-8: iconv -f {encoding.upper()} -t UTF-8 {path} > UTF8_FILE"


def _entry(where: str, path: str, text: Any, rest: dict[str, Any]) -> Entry:
    """The entry for a text and the other fields of its row."""
    data, reason = text_member(text)
    if reason:
        return Entry(where, reason=reason)
    return Entry(where, stem(path), {"txt": data, **({"json": to_json(rest)} if rest else {})})
