"""Published files that say which answers count: a list of classes, as for ImageNet-A and ImageNet-R (arXiv 1907.07174,
2006.16241), and several right labels for an image, as those of ImageNet ReaL (2006.07159).

    classes     "query": those that occur in the query set, which is ImageNet-A or -R in folders of WordNet ids; or a
                text file with one class in each line. The class is the line or its first word, so that
                `n01498041 stingray` names n01498041. Only these classes can be answered, and only their images count
    labels      real.json: a list whose entry n − 1 has the right labels of ILSVRC2012_val_0000000n, numbers of classes
                in the order of the classifier; or {name of an image without extension: its right labels}, numbers or
                names of classes. An answer is right if it is one of them; images without any are left out

Shapes: Q query images, K known classes, M the largest number of right labels of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.config import Section
from common.errors import DataError, UserError, nearest
from common.untrusted import loads
from data_pipeline.shards.samples import Samples
from eval.feature_cache import Labelled, read_batches

REAL_NAME = "ILSVRC2012_val_{:08d}"
NO_CLASS = -1


@dataclass
class AnswerFiles(Section):
    """Options of a protocol that classifies with given classes."""

    # classes that can be answered: "" for all, query for those of the query set (ImageNet-A, ImageNet-R), or a text file
    # with one class in each line
    classes: str = ""
    labels: str = ""  # a file of several right labels for each image, such as real.json of ImageNet ReaL; "": none


class Answers(NamedTuple):
    """What counts as a right answer."""

    allowed: Tensor | None  # long [A], ascending: the known classes that can be answered; None: all
    rows: Tensor  # long [Q']: the queries that count
    right: Tensor  # long [Q', M]: their right classes, indices into the known ones; NO_CLASS where there are fewer

    def correct(self, predicted: Tensor) -> Tensor:
        """Whether the predicted class [Q', …] of each query that counts is a right one: bool, of the same shape."""
        return (predicted.unsqueeze(-1) == self.right.view(len(self.right), *[1] * (predicted.ndim - 1), -1)).any(-1)


def answers(cfg: AnswerFiles, known: Sequence[str], query: Labelled, samples: Samples, protocol: str) -> Answers:
    """What counts as a right answer for the labelled queries, of a classifier with the classes `known`.

    Raises UserError or DataError, which name `protocol`, for a file that does not fit.
    """
    index = {name: n for n, name in enumerate(known)}
    right = torch.tensor([index.get(name, NO_CLASS) for name in query.names])[query.classes].unsqueeze(1)  # [Q, 1]
    allowed, counts = None, torch.ones(len(query), dtype=torch.bool)
    if cfg.classes:
        names = query.names if cfg.classes == "query" else read_classes(Path(cfg.classes), index, f"{protocol}.classes")
        allowed = torch.tensor(sorted({index[name] for name in names if name in index}), dtype=torch.long)
        listed = set(names)
        counts &= torch.tensor([name in listed for name in query.names])[query.classes]
    if cfg.labels:
        right = _right_labels(Path(cfg.labels), index, query, samples, f"{protocol}.labels")
        counts &= (right != NO_CLASS).any(1)
    rows = counts.nonzero().squeeze(1)
    if not len(rows):
        raise DataError(f"{samples.names}: no image is of a class or has a label of {cfg.classes or cfg.labels}")
    return Answers(allowed, rows, right[rows])


def read_classes(path: Path, index: dict[str, int], key: str) -> list[str]:
    """The known classes that the lines of a text file name. Raises UserError."""
    found = []
    for number, line in enumerate(_text(path, key).splitlines(), 1):
        if words := line.split():
            name = next((name for name in (line.strip(), words[0]) if name in index), None)
            if name is None:
                raise UserError(
                    f"{key}: {path}: line {number} is {line.strip()[:60]!r}, but the classifier has no class of this"
                    f" name; {nearest(words[0], index)}"
                )
            found.append(name)
    if len(set(found)) < 2:
        raise UserError(f"{key}: {path}: names {len(set(found))} classes; write one class in each line, two or more")
    return found


def read_labels(path: Path, key: str) -> dict[str, list[Any]]:
    """{name of an image: its right labels} of a file like real.json. Raises UserError."""
    try:
        content = loads(_text(path, key))
    except ValueError as error:
        raise UserError(f"{key}: {path}: is no JSON file ({error})") from None
    if isinstance(content, list):
        content = {REAL_NAME.format(n): labels for n, labels in enumerate(content, 1)}
    if not isinstance(content, dict):
        raise UserError(f"{key}: {path}: holds neither a list of lists nor {{name of an image: list of labels}}")
    for name, labels in content.items():
        if not isinstance(labels, list) or not all(isinstance(each, str) or type(each) is int for each in labels):
            raise UserError(f"{key}: {path}: {name} has {labels!r}; a list of numbers or names of classes is expected")
    return content


def _text(path: Path, key: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"{key} = {path}: cannot be read ({reason}); write the path of a file") from None


def _right_labels(path: Path, index: dict[str, int], query: Labelled, samples: Samples, key: str) -> Tensor:
    """The right classes [Q, M] of the queries."""
    labels_of, classes_of = read_labels(path, key), dict[str, list[int]]()
    for name, labels in labels_of.items():
        classes_of[name] = [_class_of(label, index, path, key) for label in labels]
    out = torch.full((len(query), max(1, *map(len, classes_of.values()))), NO_CLASS)
    at = 0
    for _, keys in read_batches(lambda n: samples.name(int(n))[1], query.numbers, 1024):  # type: ignore[arg-type]
        for sample in keys:
            name = sample.rpartition("/")[2]  # the keys of built shards are NUMBER-NAME
            classes = classes_of.get(name, classes_of.get(name.partition("-")[2]))
            if classes is None:
                raise UserError(
                    f"{key}: {path}: has no labels of {sample!r} of {samples.names}; its images are named"
                    f" {', '.join([*labels_of][:2])} …, so keep the names of the files as keys of the samples"
                )
            out[at, : len(classes)] = torch.tensor(classes, dtype=torch.long)
            at += 1
    return out


def _class_of(label: Any, index: dict[str, int], path: Path, key: str) -> int:
    """The known class of a label: of its name, or otherwise of its number. Raises UserError."""
    if str(label) in index:
        return index[str(label)]
    if isinstance(label, int) and 0 <= label < len(index):
        return label
    raise UserError(f"{key}: {path}: names the class {label!r}, which is not among the {len(index)} of the classifier")
