"""Explanations of the options of a config: the comments at the fields in the source of their dataclass."""

from __future__ import annotations

import ast
import functools
import io
import sys
import tokenize
from pathlib import Path

from common.config import Section, fields


def explanations(cls: type[Section]) -> dict[str, str]:
    """{field: its comment, or ""}.

    A comment is on the lines of the field or directly above them. A field that a subclass redefines without a comment
    has the comment of the base class.
    """
    out = dict.fromkeys(fields(cls), "")
    for base in cls.__mro__:
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        for key, text in _comments(file).get(base.__name__, {}).items() if file else ():
            if key in out:
                out[key] = out[key] or text
    return out


@functools.cache
def _comments(file: str) -> dict[str, dict[str, str]]:
    """{class: {field: comment}} of a Python file."""
    text = Path(file).read_text()
    comments: dict[int, str] = {}  # by line
    comment_lines: set[int] = set()  # lines that hold only a comment
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:")):
            words = token.string.lstrip("# ").partition("  # type:")[0].strip()
            comments[token.start[0]] = words
            if not token.line[: token.start[1]].strip():
                comment_lines.add(token.start[0])
    out: dict[str, dict[str, str]] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            field_comments = out.setdefault(node.name, {})
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    first = item.lineno
                    while first - 1 in comment_lines:
                        first -= 1
                    lines = range(first, (item.end_lineno or item.lineno) + 1)
                    field_comments[item.target.id] = " ".join(comments[n] for n in lines if comments.get(n))
    return out
