"""Token sets: they contain every document byte for byte, every token is a target exactly once, and rows do not depend
on processes and stores."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from data_pipeline.build import tokenize_text, tokenizer
from data_pipeline.build.split import split
from data_pipeline.build.stats import describe, gather
from data_pipeline.build.tokenize_text import tokenize
from data_pipeline.order.schedule import Phase
from data_pipeline.shards import index
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.packing import best_fit
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.token_blocks import Blocks
from data_pipeline.shards.token_rows import Rows, targets_of
from data_pipeline.shards.vocabulary import Vocabulary, with_template
from data_pipeline.stream.damage_log import DamageLog
from data_pipeline.stream.stream import Reading, Stream
from tests.conftest import call
from tests.data.building import quiet
from tests.data.texts import prose, read, shards_of, texts_in, tokens_of, word_pieces, write_texts
from tests.services import FaultProxy, ObjectStore
from tests.tars import jpeg, write_tar

# hashes of the shards that earlier versions wrote from the same texts, with a tokenizer that has <|bos|>
DIGESTS = ("3f2408347faa448a", "bb59166770d2739a")


SPLIT = (  # LLaMA 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def keep(sample, rng):
    return {key: sample[key] for key in ("tokens", "documents")} | {"draw": rng(1).random()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "text")


@pytest.fixture(scope="module")
def token_set(texts: Path) -> Path:
    return tokens_of(texts, texts.parent / "tokens")


@pytest.fixture(scope="module")
def separate_set(texts: Path) -> Path:
    """A set whose tokenizer has different tokens for BOS and EOS."""
    return tokens_of(texts, texts.parent / "separate_set", specials=("<|bos|>",))


# ---------------------------------------------------------------- the content of a set
def test_every_document_is_read_back(texts: Path, token_set: Path):
    blocks, originals = Blocks([str(token_set)]), texts_in(texts)
    vocabulary = blocks.vocabulary
    own = vocabulary.tokenizer()
    documents = list(blocks.documents())
    assert len(documents) == len(originals) == 120
    for (ids, size), text in zip(documents, originals, strict=True):
        assert size == len(text.encode()) == vocabulary.token_bytes[ids].sum()
        assert ids[0] == vocabulary.bos == vocabulary.eos == ids[-1] and not vocabulary.special[ids[1:-1]].any()
        assert own.decode(ids[1:-1].tolist()) == text  # the name of a special token in a text is text
    about = load_manifest(str(token_set)).details
    assert about["tokens"]["bytes"] == sum(len(t.encode()) for t in originals)
    shared = len(documents) - len(about["tokens"]["shards"])  # one token separates two documents
    assert about["tokens"]["tokens"] == sum(len(ids) for ids, _ in documents) - shared
    assert about["tokens"]["tokens"] == sum(about["tokens"]["shards"].values())
    assert (
        about["tokens"]["exact_bytes"]
        and about["tokens"]["dtype"] == "<u2"
        and len(blocks) > 3 * len(about["tokens"]["shards"])
    )
    assert blocks.text_bytes() == about["tokens"]["bytes"]
    assert index.verify(token_set, quiet) == []
    assert "documents" in "\n".join(describe(gather(token_set)))


def test_a_document_that_begins_with_a_block_counts_once(tmp_path: Path):
    (tmp_path / "text").mkdir()
    for size, specials in (
        (1022, ("<|bos|>",)),
        (1023, ()),
    ):  # one byte per token; separate BOS and EOS, or one token for both
        own = tmp_path / str(size)
        own.mkdir()
        write_tar(own / "0.tar", [(f"{n}.txt", bytes([65 + n]) * size) for n in range(3)])
        index.write(own, quiet)
        options = {"vocab": 259 + len(specials), "block": 1024, "specials": specials}
        blocks = Blocks([str(tokens_of(own, own / "tokens", **options))])
        assert len(blocks) == 3 and blocks.load(0)[1].starts.tolist() == [0, 1024]
        documents = list(blocks.documents())
        assert [bytes for _, bytes in documents] == [size] * 3 and blocks.text_bytes() == 3 * size
        assert {len(ids) for ids, _ in documents} == {size + 2}
        assert {ids[0] for ids, _ in documents} == {blocks.vocabulary.bos}
        assert {ids[-1] for ids, _ in documents} == {blocks.vocabulary.eos}


def test_tokens_between_documents(texts: Path, token_set: Path, separate_set: Path):
    """There is one if BOS equals EOS, and two if they differ, as in the shards of earlier versions."""
    joined, two = Blocks([str(token_set)]), Blocks([str(separate_set)])
    assert set(joined.joined) == {True} and set(two.joined) == {False}
    first, second = texts_in(texts)[:2]
    for blocks, between in ((joined, 1), (two, 2)):
        known, ids = blocks.vocabulary, blocks.load(0)[0].tolist()
        own = known.tokenizer()
        a, b = (own.encode(text, add_special_tokens=False).ids for text in (first, second))
        middle = [known.eos] if between == 1 else [known.eos, known.bos]
        assert ids[: len(a) + len(b) + 2 + between] == [known.bos, *a, *middle, *b, known.eos]
        last = blocks.load(len(blocks) - 1)[0]
        assert last[-1] == known.eos and last[-2] != known.eos
    made = [xxhash.xxh3_64_hexdigest(file.read_bytes()) for file in sorted(separate_set.glob("*.tar"))]
    assert tuple(made) == DIGESTS


def test_the_tokenizer_adds_bos(token_set: Path, tmp_path: Path):
    """Any library that opens tokenizer.json adds BOS to a text, as training does. The hash of the tokenizer does not
    change."""
    made = Vocabulary.read(str(token_set))
    own = made.tokenizer()
    assert own.encode("sea").ids == [made.bos, *own.encode("sea", add_special_tokens=False).ids]
    plain = json.loads(made.text) | {"post_processor": None}
    bare = Vocabulary.parse(json.dumps(plain))
    assert bare.hash == made.hash and bare.tokenizer().encode("sea").ids == own.encode("sea").ids[1:]
    assert with_template(made.text, made.bos) == made.text  # once
    both = Vocabulary.parse(with_template(bare.text, made.bos, made.eos))
    assert both.tokenizer().encode("sea").ids == [*own.encode("sea").ids, made.eos] and both.hash == made.hash
    level = plain | {
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    }
    with_level = Vocabulary.parse(json.dumps(level))
    more = Vocabulary.parse(with_template(with_level.text, made.bos))
    assert more.tokenizer().encode("sea").ids == own.encode("sea").ids
    assert more.hash == with_level.hash != made.hash  # as for GPT-2's, whose sets have been made with it
    bert = {"type": "BertProcessing", "sep": ["<|pad|>", 1], "cls": ["<|endoftext|>", 0]}
    theirs = json.dumps(plain | {"post_processor": bert})
    assert with_template(theirs, 0, 1) == theirs and with_template(theirs, None) == theirs


def test_transformers_opens_the_tokenizer_of_a_set(token_set: Path):
    import transformers

    theirs, mine = transformers.AutoTokenizer.from_pretrained(token_set), Vocabulary.read(str(token_set))
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (mine.eos, mine.pad, mine.mask)
    assert theirs("the sea under 語")["input_ids"] == mine.tokenizer().encode("the sea under 語").ids
    assert len(theirs) == mine.size == 400


def test_training_a_tokenizer_is_deterministic_and_adds_the_requested_special_tokens(texts: Path, tmp_path: Path):
    said: list[str] = []
    made = [
        tokenizer.train(str(texts), tmp_path / f"{n}.json", 450, ["sentinels", "<|user|>"], 50_000, said.append)
        for n in range(2)
    ]
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes() and not said
    assert made[0].size == 450 and len(made[0].sentinels) == 100 and made[0].sentinels[0] == 3
    ids = {t["content"]: t["id"] for t in json.loads(made[0].text)["added_tokens"]}
    assert (ids["<extra_id_99>"], ids["<|user|>"]) == (made[0].sentinels[-1], 103)
    assert not made[0].token_bytes[:104].any() and made[0].token_bytes[104:].min() == 1
    with pytest.raises(DataError, match="write 259 "):
        tokenizer.train(str(texts), tmp_path / "small.json", 100)
    with pytest.raises(DataError, match=r"holds .jpg and no .txt"):
        write_tar(tmp_path / "i.tar", [("0.jpg", jpeg())])
        tokenizer.train(str(tmp_path / "i.tar"), tmp_path / "i.json", 300)


def test_a_tokenizer_that_is_there_is_not_replaced(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("mine")
    for target in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(DataError, match=r"tokenizer\.json: exists already; name another file or folder"):
            call("shards", "tokenizer", tmp_path / "texts", target)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"


def test_roles_of_other_tokenizers_and_their_bytes(tmp_path: Path):
    def vocabulary(names: list[str], config: dict | None = None) -> Vocabulary:
        added = [{"id": n, "content": name, "special": True} for n, name in enumerate(names)]
        text = json.dumps({"model": {"type": "WordPiece", "vocab": {"sea": len(names)}}, "added_tokens": added})
        return Vocabulary.parse(text, json.dumps(config or {}))

    bert = vocabulary(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    assert (bert.size, bert.pad, bert.bos, bert.eos, bert.mask) == (6, 0, 2, 3, 4)
    t5 = vocabulary(["<pad>", "</s>", "<unk>", "<extra_id_1>", "<extra_id_0>"])
    assert (t5.pad, t5.bos, t5.eos, t5.sentinels) == (0, None, 1, (4, 3))
    named = vocabulary(["<a>", "<b>"], {"eos_token": {"content": "<b>"}, "bos_token": "<a>"})
    assert (named.bos, named.eos) == (0, 1)
    with pytest.raises(DataError, match="not byte-level"):
        _ = bert.token_bytes
    (tmp_path / "tokenizer.json").write_text("{}")
    for name, match in [("tokenizer.json", "is not a valid tokenizer.json"), ("other", "no such file")]:
        with pytest.raises(DataError, match=match):
            Vocabulary.read(str(tmp_path / name))


def test_damaged_documents_are_listed_and_left_out(tmp_path: Path):
    folder = tmp_path / "text"
    folder.mkdir()
    write_tar(folder / "0.tar", [("a.txt", b"fine sea " * 40), ("b.txt", b"\xff\xfe bad"), ("c.json", b"{}")])
    write_tar(folder / "1.tar", [("d.txt", b"damaged later" * 20), ("e.txt", b"good wind " * 30)])
    index.write(folder, quiet)
    data = bytearray((folder / "1.tar").read_bytes())
    data[520] ^= 1
    (folder / "1.tar").write_bytes(data)
    token_set = tokens_of(folder, tmp_path / "tokens", vocab=270, shard_mb=1)
    assert len(list(Blocks([str(token_set)]).documents())) == 2
    bad = {row["path"].rpartition("/")[2]: row["reason"] for row in map(json.loads, (token_set / "bad.jsonl").open())}
    assert bad.keys() == {"b", "c", "d"} and "is not UTF-8" in bad["b"] and "no .txt" in bad["c"] and "hash" in bad["d"]


def test_text_that_a_tokenizer_loses_is_counted_and_reported(tmp_path: Path):
    folder = tmp_path / "text"
    folder.mkdir()
    write_tar(folder / "0.tar", [("a.txt", "the sea the 語 sea".encode()), ("b.txt", "海 the".encode())])
    index.write(folder, quiet)
    file = word_pieces(tmp_path / "words.json", "the sea")
    summary = tokenize(folder, tmp_path / "words", file, workers=1, say=quiet)
    assert (summary["unknown"], summary["lost"], summary["tokens"]) == (2, 0, 11)
    assert load_manifest(str(tmp_path / "words")).details["tokens"]["unknown"] == 2
    said = "\n".join(tokenize_text.describe(summary, "words"))
    assert "warning: 2 tokens stand for text that the tokenizer does not know (18.18% of all tokens)" in said
    content = json.loads(file.read_text())
    letters = {name: n for n, name in enumerate("thesa")}
    content["model"] = {"type": "BPE", "vocab": letters, "merges": [], "unk_token": None}
    (tmp_path / "bpe.json").write_text(json.dumps(content | {"added_tokens": []}))
    summary = tokenize(folder, tmp_path / "bpe", tmp_path / "bpe.json", workers=1, say=quiet)
    assert (summary["unknown"], summary["lost"], summary["tokens"]) == (
        0,
        2,
        15,
    )  # the tokenizer drops them without an unknown token
    assert "warning: 2 characters were dropped by the tokenizer" in "\n".join(tokenize_text.describe(summary, "bpe"))
    with pytest.raises(DataError, match="is a WordPiece model without a token for unknown text"):
        tokenize(folder, tmp_path / "never", word_pieces(tmp_path / "none.json", "the sea", None), workers=1, say=quiet)
    whole = tokenizer.train(str(folder), tmp_path / "whole.json", 259, say=quiet)
    assert whole.known_characters is None and whole.count_dropped("語", whole.tokenizer()) == 0 and whole.unk is None
    content = json.loads(whole.text)  # byte-level, but trained without all bytes
    content["model"] |= {"vocab": {k: v for k, v in content["model"]["vocab"].items() if k < "\u0100"}}
    some = Vocabulary.parse(json.dumps(content))
    assert some.count_dropped("sea", some.tokenizer()) == 0 and some.count_dropped("sea\x01", some.tokenizer()) == 1


@pytest.mark.slow
def test_a_huge_document_is_tokenized_in_pieces_to_the_same_tokens(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With tokenizers of all kinds, and a document that is much longer than CHARACTERS_AT_ONCE. A very long word is not
    cut."""
    long = "\n\n".join(prose(n, 2000) for n in range(6)) + "語" * 10_000 + "x" * 9000 + " end. " + prose(7, 4000)
    content = json.loads(tokenizer.train(str(texts), tmp_path / "own.json", 400, say=quiet).text)
    llama2 = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]}  # fmt: skip
    ids = {letter: n for n, letter in enumerate(sorted({"▁", "<unk>", *long.replace(" ", "▁"), "▁t", "th", "▁the"}))}
    merges = [["▁", "t"], ["t", "h"], ["▁t", "he"]][:2]
    bpe = {"type": "BPE", "vocab": ids, "merges": merges, "unk_token": "<unk>"}
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    kinds = {
        "own": content,
        "llama3": content | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]}},
        "llama2": content | {"normalizer": llama2, "pre_tokenizer": None, "model": bpe, "added_tokens": []},
        "metaspace": content | {"pre_tokenizer": spaces, "model": bpe, "added_tokens": []},
        "words": json.loads(word_pieces(tmp_path / "w.json", "the sea of und").read_text()),
    }  # fmt: skip
    for name, kind in kinds.items():
        own = Vocabulary.parse(json.dumps(kind | {"post_processor": None, "decoder": None})).tokenizer()
        parts = list(tokenize_text.pieces(long, own, 8192))
        whole = own.encode(long, add_special_tokens=False).ids
        assert whole == [n for part in parts for n in own.encode(part, add_special_tokens=False).ids], name
        assert len(parts) > 6 and max(map(len, parts)) <= 40_000, name
    folder = tmp_path / "text"
    folder.mkdir()
    write_tar(folder / "0.tar", [("a.txt", b"sea"), ("b.txt", long.encode()), ("c.txt", b"the wind")])
    index.write(folder, quiet)
    made = tokens_of(folder, tmp_path / "whole", vocab=0, tokenizer_file=tmp_path / "own.json", shard_mb=5)
    monkeypatch.setattr(tokenize_text, "CHARACTERS_AT_ONCE", 10_000)
    target = tmp_path / "cut.tar"
    samples, vocabulary, bad = Samples([str(folder)]), Vocabulary.read(str(tmp_path / "own.json")), []
    asked: list[int] = []
    monkeypatch.setattr(tokenize_text, "pieces", _watched(asked, tokenize_text.pieces))
    with target.open("wb") as file:
        task = {"number": 0, "first": 0, "count": 3}
        tokenize_text._write(samples, vocabulary, task, 4096, file, lambda count: bad.append(count))
    assert max(asked) <= 40_000 and len(asked) > 5
    assert target.read_bytes() == (made / "000000.tar").read_bytes()


def _watched(asked: list[int], pieces):
    """`pieces` with the present CHARACTERS_AT_ONCE of the module; appends the length of each piece to `asked`."""

    def watched(text: str, own) -> Iterator[str]:
        for piece in pieces(text, own, tokenize_text.CHARACTERS_AT_ONCE):
            asked.append(len(piece))
            yield piece

    return watched


@pytest.mark.slow
def test_the_memory_of_a_huge_document(tmp_path: Path):
    """One document of 5 MB, whose encodings would take 600 MB."""
    folder = tmp_path / "text"
    folder.mkdir()
    write_tar(folder / "0.tar", [("a.txt", (prose(1, 20_000).encode() + b"\n") * 40)])
    index.write(folder, quiet)
    tokenizer.train(str(folder), tmp_path / "own.json", 300, limit=1 << 20, say=quiet)
    code = (
        "import resource, sys; from data_pipeline.build import tokenize_text as t; from data_pipeline.shards.samples import Samples;"
        "from data_pipeline.shards.vocabulary import Vocabulary; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "t._write(Samples([sys.argv[1]]), Vocabulary.read(sys.argv[2]), {'number': 0, 'first': 0, 'count': 1}, 4096, open(sys.argv[3], 'wb'), print);"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    words = [sys.executable, "-c", code, folder, tmp_path / "own.json", tmp_path / "out.tar"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    size = (folder / "0.tar").stat().st_size >> 20
    assert size >= 3 and int(done.stdout.split()[-1]) < 300  # MB


@pytest.mark.slow
def test_large_vocabularies_use_four_bytes_per_token(texts: Path, tmp_path: Path):
    content = json.loads(tokenizer.train(str(texts), tmp_path / "a.json", 300).text)
    words = {f"Ġw{n}": 300 + n for n in range(70000)}  # no merge gives them, but they are in the vocabulary
    content["model"]["vocab"] |= words
    (tmp_path / "large.json").write_text(json.dumps(content))
    large = tokens_of(texts, tmp_path / "large", vocab=0, tokenizer_file=tmp_path / "large.json")
    small = tokens_of(texts, tmp_path / "small", vocab=0, tokenizer_file=tmp_path / "a.json")
    assert load_manifest(str(large)).details["tokens"]["dtype"] == "<u4"
    for one, other in zip(Blocks([str(large)]).documents(), Blocks([str(small)]).documents(), strict=True):
        assert np.array_equal(one[0], other[0]) and one[1] == other[1]
    one, other = Rows([str(large)], 100), Rows([str(small)], 100)
    assert np.array_equal(read(one, 77)["tokens"], read(other, 77)["tokens"])


# ---------------------------------------------------------------- rows
@pytest.mark.parametrize("kind", ["token_set", "separate_set"])
@pytest.mark.parametrize("length", [64, 1000, 4096])
def test_split_rows_make_every_token_a_target_exactly_once(kind: str, length: int, request: pytest.FixtureRequest):
    token_set, joined = request.getfixturevalue(kind), kind == "token_set"
    rows, at = Rows([str(token_set)], length), 0
    for documents in shards_of(token_set):
        own = [d[:-1] for d in documents[:-1]] + documents[-1:] if joined else documents
        tokens = np.concatenate(own).astype(np.int64)
        number = np.repeat(np.arange(len(documents)), [len(d) for d in own])
        seen = 1  # the first token of a shard is only an input
        while seen < len(tokens):
            row = read(rows, at)
            count = int((row["documents"] >= 0).sum())
            assert np.array_equal(row["tokens"][:count], tokens[seen - 1 : seen - 1 + count])
            asked = targets_of(row)
            same = joined | (row["documents"][1:count] == row["documents"][: count - 1])
            assert np.array_equal(asked[: count - 1], np.where(same, row["tokens"][1:count], -100))
            assert (asked[count - 1 :] == -100).all()
            assert np.array_equal(row["documents"][:count], number[seen - 1 : seen - 1 + count] - number[seen - 1])
            assert (row["documents"][count:] == -1).all() and (row["tokens"][count:] == rows.pad).all()
            seen, at = seen + count - 1, at + 1
        assert seen == len(tokens)
    assert at == len(rows)
    assert not read(Rows([str(token_set)], length, document_mask=False), 3)["documents"].any()


@pytest.mark.parametrize("kind", ["token_set", "separate_set"])
@pytest.mark.parametrize("length", [50, 128])
def test_best_fit_rows_make_every_token_inside_a_document_a_target_exactly_once(
    kind: str, length: int, request: pytest.FixtureRequest
):
    token_set = request.getfixturevalue(kind)
    rows, plain = Rows([str(token_set)], length, "best_fit"), Rows([str(token_set)], length)
    pairs: Counter[tuple[int, int]] = Counter()
    wasted = 0
    for number in range(len(rows)):
        row = read(rows, number)
        same = (row["documents"][1:] == row["documents"][:-1]) & (row["documents"][1:] >= 0)
        asked = targets_of(row)
        known = asked >= 0
        assert (asked[same] == row["tokens"][1:][same]).all() or kind == "token_set"
        pairs.update(zip(row["tokens"][:-1][known].tolist(), asked[known].tolist(), strict=True))
        wasted += int((row["documents"] < 0).sum())
    whole: Counter[tuple[int, int]] = Counter()
    for document in itertools.chain.from_iterable(shards_of(token_set)):
        whole.update(itertools.pairwise(document.tolist()))
    assert pairs == whole and len(rows) == len(plain)
    assert wasted < 0.06 * len(rows) * length  # shards and blocks are short, so that their last windows are not full


def naive_best_fit(first: int, last: int, starts: list[int], length: int, joined: bool) -> list[list[tuple[int, int]]]:
    """`best_fit` by exhaustive search. With `joined`, pieces consist of targets, and the position of a target is the
    token before it."""
    capacity = length if joined else length + 1  # tokens of a row
    repeated = capacity - length  # tokens that a cut repeats
    begins = sorted({first, *(s for s in starts if first < s <= last)})
    pieces = []
    for begin, end in zip(begins, [*begins[1:], last + repeated], strict=True):
        if begin == last:
            continue
        while end - begin > capacity:
            pieces.append((begin, capacity))
            begin += length
        if end - begin > repeated:
            pieces.append((begin, end - begin))
    rows: list[list[tuple[int, int]]] = [[] for _ in range(-(-(last - first) // length))]

    def free(n: int) -> int:
        return capacity - sum(size for _, size in rows[n])

    unplaced = []
    for start, size in sorted(pieces, key=lambda p: (-p[1], p[0])):
        fitting = [n for n in range(len(rows)) if free(n) >= size]
        if fitting:
            rows[min(fitting, key=lambda n: (free(n), n))].append((start, size))
        else:
            unplaced.append((start, size))
    for start, size in unplaced:
        while size > repeated:
            fitting = [n for n in range(len(rows)) if free(n) >= size]
            if fitting:
                n = min(fitting, key=lambda n: (free(n), n))
            else:
                n = max(range(len(rows)), key=lambda n: (free(n), n))
            take = min(size, free(n))
            rows[n].append((start, take))
            start, size = start + take - repeated, size - take + repeated
    return sorted(sorted(row) for row in rows)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_best_fit_equals_an_exhaustive_search_and_loses_no_token(data: st.DataObject):
    length = data.draw(st.integers(1, 12))
    first = data.draw(st.integers(0, 5))
    last = first + data.draw(st.integers(1, 32 * length))
    starts = sorted(data.draw(st.sets(st.integers(0, last + 5), max_size=80)))
    for joined in (False, True):
        rows = best_fit(first, last, np.array(starts, "<u4"), length, joined)
        assert rows == naive_best_fit(first, last, starts, length, joined)
        most = length + (not joined)
        assert len(rows) == -(-(last - first) // length) and all(sum(size for _, size in row) <= most for row in rows)
        targets = Counter(t for row in rows for start, size in row for t in range(start + 1, start + size + joined))
        assert targets == Counter(t for t in range(first + 1, last + 1) if joined or t not in starts)


# ---------------------------------------------------------------- streams
@pytest.mark.slow
@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_batches_are_the_same_for_any_number_of_processes_and_workers_and_after_a_resume(
    token_set: Path, tmp_path: Path, packing
):
    def stream(rank=0, world=1, accumulate=1, **reading) -> Stream:
        both = [Rows([str(token_set)], 64, packing), Rows([str(token_set)], 64, packing)]
        phases = [Phase(0, 12, (3.0, 1.0), (0.0, 0.0)), Phase(3, 24, (1.0, 1.0), (0.0, 0.0))]
        reading = Reading(**{"workers": 0, **reading})
        return Stream(both, keep, 12, 3, rank=rank, world=world, accumulate=accumulate, phases=phases, reading=reading)

    whole = stream()
    batches = [next(whole) for _ in range(6)]
    for world, accumulate, reading in [(2, 1, {}), (3, 2, {"workers": 2}), (1, 3, {"cache": str(tmp_path / "c")})]:
        streams = [stream(r, world, accumulate, **reading) for r in range(world)]
        for s in streams:
            s.load_state_dict({**s.state_dict(), "step": 2})
        for batch in batches[2:]:
            parts = [next(s) for s in streams for _ in range(accumulate)]
            for key in batch:
                assert np.array_equal(np.concatenate([p[key] for p in parts]), batch[key]), (world, accumulate, key)
        for s in streams:
            s.close()
    assert batches[0]["tokens"].shape == (12, 65) and len(json.dumps(whole.state_dict())) < 200
    other = Stream(Rows([str(token_set)], 32, packing), keep, 12, 3, workers=0)
    with pytest.raises(DataError, match="written on other data"):
        other.load_state_dict(whole.state_dict())


def test_an_epoch_has_each_row_once(token_set: Path):
    rows = Rows([str(token_set)], 100)
    stream = Stream(rows, keep, 9, workers=0)
    seen = Counter(n for _ in range(2 * len(rows) // 9) for n in next(stream)["id"].tolist())
    assert set(seen) == set(range(len(rows))) and set(seen.values()) <= {1, 2, 3} and stream.epochs[0] > 1.9


def test_damaged_pages_are_logged_and_replaced(token_set: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in token_set.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    rows = Rows([str(copy)], 64)
    url, _, (offset, _, _) = rows.blocks.members(0)
    data = bytearray(Path(url).read_bytes())
    data[offset + 700] ^= 4  # token 350, of row 5; the page has rows 0 to 15
    Path(url).write_bytes(data)
    damage_log = DamageLog(None, share=1, shard_share=1)
    stream = Stream(Rows([str(copy)], 64), keep, 8, shuffle=False, workers=0, damage_log=damage_log)
    batch = next(stream)
    clean = Stream(Rows([str(token_set)], 64), keep, 8, shuffle=False, workers=0)
    sound = {tuple(read(rows, n)["tokens"].tolist()) for n in range(16, len(rows))}
    assert all(tuple(row.tolist()) in sound for row in batch["tokens"]) and len(next(clean)["tokens"]) == 8
    assert ("000000-000000 row 5") in {key for _, key in damage_log.bad} and "tokens from 0 on" in next(
        iter(damage_log.bad.values())
    )
    assert any("000000-000000.tokens" in problem for problem in index.verify(copy, quiet))


# ---------------------------------------------------------------- errors
def test_errors_say_what_to_write(texts: Path, token_set: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"holds .txt and no tokens; make them with `unlabeled shards tokenize"):
        Rows([str(texts)], 64)
    with pytest.raises(DataError, match=r"data.length = 5000: must be 1 or more, and at most the 4096 tokens"):
        Rows([str(token_set)], 5000)
    other = tokens_of(texts, tmp_path / "other", vocab=300)
    with pytest.raises(DataError, match="different tokenizers"):
        Rows([str(token_set), str(other)], 64)
    (other / "tokenizer.json").write_text((token_set / "tokenizer.json").read_text())
    with pytest.raises(DataError, match="is not the tokenizer that the tokens in its folder were made with"):
        _ = Rows([str(other)], 64).vocabulary
    with pytest.raises(DataError, match="split the text shards"):
        split(token_set, tmp_path / "split", 0.1, workers=1)
    for options, match in [
        ({"vocab": 0}, "either --tokenizer FILE, or --vocab N"),
        ({"block": 5000}, "write a multiple of 1024"),
        ({"vocab": 300, "shard_mb": 0}, "--shard-mb 0"),
        ({"vocab": 0, "tokenizer_file": token_set, "specials": ("<a>",)}, "--specials is for a new tokenizer"),
    ]:
        with pytest.raises(DataError, match=match):
            tokens_of(texts, tmp_path / "never", **options)
    write_tar(tmp_path / "i.tar", [("0.jpg", jpeg())])
    with pytest.raises(DataError, match=r"holds .jpg and no .txt"):
        tokens_of(tmp_path / "i.tar", tmp_path / "never")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.jsonl").write_text('{"text": "sea"}')
    with pytest.raises(DataError, match=r"plain: holds text but no shards; make them with `unlabeled shards build"):
        tokens_of(tmp_path / "plain", tmp_path / "never")
    (tmp_path / "words.txt").write_text("sea")
    (tmp_path / "folder.json").mkdir()
    for name, match in (("words.txt", "no such file; name a tokenizer"), ("folder.json", "cannot be read")):
        begun = time.monotonic()
        with pytest.raises(DataError, match=match):
            tokens_of(texts, tmp_path / "never", vocab=0, tokenizer_file=tmp_path / name)
        assert time.monotonic() - begun < 30  # at once, because retries do not help
    unreadable = tmp_path / "tokenizer.json"
    unreadable.write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(DataError, match=rf"{unreadable}: tokenizers .* cannot read it"):
        tokens_of(texts, tmp_path / "never", vocab=0, tokenizer_file=unreadable)
    assert not (tmp_path / "never").exists()


# ---------------------------------------------------------------- processes, kills, stores
def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
def test_tokenizing_is_the_same_for_any_number_of_processes(texts: Path, token_set: Path, tmp_path: Path):
    assert content(tokens_of(texts, tmp_path / "tokens", workers=3)) == content(token_set)
    again = tokens_of(texts, tmp_path / "tokens", workers=1)  # nothing to do
    assert content(again) == content(token_set)


@pytest.mark.slow
def test_killed_tokenizing_is_resumed_with_the_same_result(tmp_path: Path):
    texts = write_texts(tmp_path / "text", 600, 2, 4000)
    expected = content(tokens_of(texts, tmp_path / "whole"))
    target = tmp_path / "killed"
    words = [sys.executable, "-m", "launch.cli", "shards", "tokenize", str(texts), str(target), "--vocab", "400"]
    words += ["--shard-mb", "0.1", "--block", "4096", "--workers", "2"]
    state, kills = Path(f"{target}.partial"), 0
    while not target.exists():
        done = len(list(state.glob("[0-9]*.json")))
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and (kills > 2 or len(list(state.glob("[0-9]*.json"))) < done + 2):
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 3 and content(target) == expected and not state.exists()


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_rows_from_a_store_equal_rows_from_a_disk(
    store: ObjectStore, proxy: FaultProxy, token_set: Path, tmp_path: Path, packing: str
):
    url = store.put_folder(token_set, f"tokens-{packing}")
    proxy.set(error_rate=0.05, short_rate=0.1, flip_rate=0.1)
    local = Stream(Rows([str(token_set)], 64, packing), keep, 12, 3, workers=0)
    expected = [next(local) for _ in range(20)]
    for reading in (Reading(workers=2), Reading(workers=1, cache=str(tmp_path / "token_set"), cache_gb=1)):
        remote = Stream(Rows([url], 64, packing), keep, 12, 3, reading=reading)
        for batch in expected:
            found = next(remote)
            for key in batch:
                assert np.array_equal(found[key], batch[key])
        assert not remote.damage_log.bad
        remote.close()


@pytest.mark.slow
def test_tokens_are_written_to_a_store(store: ObjectStore, proxy: FaultProxy, texts: Path, token_set: Path):
    source = store.put_folder(texts, "texts")
    target = source.rsplit("/", 1)[0] + "/made"
    tokens_of(source, target)  # type: ignore[arg-type]
    assert Samples([target]).id == Samples([str(token_set)]).id and index.verify(target, quiet) == []
    assert Vocabulary.read(target).hash == Vocabulary.read(str(token_set)).hash
