"""Bits per byte compared with a naive sum, its exact counts and its errors; the samples and the report of a run on
text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from common.errors import DataError, UserError
from data_pipeline.build import tokenizer
from data_pipeline.shards import index
from data_pipeline.shards.token_blocks import Blocks
from eval import report, results
from eval.features import open_encoder
from eval.run import evaluate
from eval.text_features import bytes_of
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.train import train
from tests.conftest import tiny, tiny_recipe, tokens, unlabeled
from tests.data.building import quiet
from tests.data.texts import tokens_of, word_pieces
from tests.tars import write_tar


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The last exports of a decoder and an encoder."""
    out = tmp_path_factory.mktemp("runs")
    found = {name: train(tiny_recipe(name, shards, out / name, "steps=4")) for name in ("gpt", "bert")}
    return {name: run / "export" / "4" for name, run in found.items()}


@pytest.mark.parametrize("masked", [True, False])
def test_bits_per_byte_equals_a_naive_sum_over_documents(masked: bool, runs: dict[str, Path], shards: Path):
    """Row by row of 32 tokens, one token at a time, in float64."""
    held = tokens(shards.parent)
    rows = evaluate(
        runs["gpt"], ["bits_per_byte"], [], [str(held)], options={"bits_per_byte": {"document_mask": masked}}
    )
    value = {row["metric"]: row for row in rows}
    encoder, _ = open_encoder(str(runs["gpt"]))
    model, blocks = encoder.backbone.double(), Blocks([str(held)])
    documents = [list(blocks.documents(n, n + 1)) for n in range(len(blocks.first) - 1)]
    text = sum(size for shard in documents for _, size in shard)
    assert (
        value["bits_per_byte"]["count"] == text and value["bits_per_byte"]["unit"] == "bytes"
    )  # each byte is counted once
    if not masked:
        return
    nats, count = 0.0, 0
    with torch.inference_mode():
        for shard in documents:
            at = 0  # position in the shard; rows begin at multiples of 32
            for ids, _ in shard:
                for begin in range(0, len(ids)):
                    place = at + begin
                    if begin + 1 >= len(ids):
                        break
                    seen = ids[max(0, begin - place % 32) : begin + 1]
                    logits = model.head(model(torch.tensor(seen[None].astype("int64"))).tokens[0, -1])
                    nats -= float(logits.double().log_softmax(-1)[int(ids[begin + 1])])
                    count += 1
                    if count >= 400:
                        break
                at += len(ids) - 1  # its last token is the first one of the next document
                if count >= 400:
                    break
            break
    # the same model on the first 400 targets, with the batches of the protocol
    from eval.bits_per_byte import batch

    encoder.backbone.float()
    opened = encoder.rows([str(held)], None, True)
    total, seen_targets, number = 0.0, 0, 0
    with torch.inference_mode():
        while seen_targets < 400:
            ids, docs, targets = batch(opened, range(number, number + 1))
            valid = (targets != -100).nonzero()[:, 1].tolist()[: 400 - seen_targets]
            keep = torch.full_like(targets, -100)
            keep[0, valid] = targets[0, valid]
            total += float(model.head(model(ids[:, :-1], documents=docs[:, :-1]).tokens, keep))
            seen_targets += len(valid)
            number += 1
    assert total == pytest.approx(nats, rel=1e-5)


def test_an_untrained_model_needs_log2_of_its_vocabulary_per_token(shards: Path, tmp_path: Path):
    run = train(tiny_recipe("gpt", shards, tmp_path / "run", "steps=1"))
    rows = evaluate(run / "export" / "0", ["bits_per_byte"], [], [str(tokens(shards.parent))])
    value = {row["metric"]: row["value"] for row in rows}
    assert value["bits_per_token"] == pytest.approx(math.log2(512), rel=0.02)
    assert value["unigram"] < value["bits_per_byte"] and {row["model"] for row in rows} == {"untrained"}
    assert f"{value['bits_per_byte']:.3f}" in results.table(rows)


def test_bytes_of_a_tokenizer_that_changes_text_are_those_of_the_documents(shards: Path, tmp_path: Path):
    """NFC makes a token of two bytes from "e" and an accent, which have three bytes."""
    (tmp_path / "text").mkdir()
    texts = ["cafe\u0301 " * 40, "nai\u0308ve sea " * 60]
    write_tar(tmp_path / "text" / "0.tar", [(f"{n}.txt", text.encode()) for n, text in enumerate(texts)])
    index.write(tmp_path / "text", quiet)
    file = tmp_path / "tokenizer.json"
    tokenizer.train(str(tmp_path / "text"), file, 300, say=quiet)
    content = json.loads(file.read_text()) | {"normalizer": {"type": "NFC"}}
    file.write_text(json.dumps(content))
    held = tokens_of(tmp_path / "text", tmp_path / "tokens", vocab=0, tokenizer_file=file)
    run = train(tiny_recipe("gpt", shards, tmp_path / "run", f"data.train={held}", "data.batch=4", "steps=1"))
    rows = {row["metric"]: row for row in evaluate(run / "export" / "1", ["bits_per_byte"], [], [str(held)])}
    count = sum(len(text.encode()) for text in texts)
    total = Blocks([str(held)]).tokens.sum() - 1  # the first BOS is given, the others end a document
    assert rows["bits_per_byte"]["count"] == count
    assert rows["bits_per_byte"]["value"] * count == pytest.approx(rows["bits_per_token"]["value"] * total)
    content["added_tokens"] = content["added_tokens"][1:]
    del content["model"]["vocab"]["<|endoftext|>"]
    file.write_text(json.dumps(content))
    held = tokens_of(tmp_path / "text", tmp_path / "other", vocab=0, tokenizer_file=file)
    run = train(tiny_recipe("gpt", shards, tmp_path / "bare", f"data.train={held}", "data.batch=4", "steps=1"))
    with pytest.raises(UserError, match="not byte-level and has no token that begins a document"):
        evaluate(run / "export" / "1", ["bits_per_byte"], [], [str(held)])


def test_text_that_the_tokenizer_does_not_know_is_reported_or_refused(shards: Path, tmp_path: Path):
    file = word_pieces(tmp_path / "tokenizer.json", "the sea")
    sets = {}
    for name, words in (("some", "the sea " * 3000 + "語 "), ("many", "the sea " * 300 + "語 " * 300)):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", [("0.txt", words.encode())])
        index.write(tmp_path / name, quiet)
        sets[name] = tokens_of(tmp_path / name, tmp_path / f"{name}-tokens", vocab=0, tokenizer_file=file)
    run = train(tiny_recipe("gpt", shards, tmp_path / "run", f"data.train={sets['some']}", "data.batch=4", "steps=1"))
    rows = evaluate(run / "export" / "1", ["bits_per_byte"], [], [str(sets["some"])])
    value = {row["metric"]: row["value"] for row in rows}
    assert value["unknown_share"] == pytest.approx(1 / 6002, abs=1e-5)
    with pytest.raises(UserError, match=r"33\.3% of its tokens stand for text that the tokenizer does not know"):
        evaluate(run / "export" / "1", ["bits_per_byte"], [], [str(sets["many"])])


def test_models_and_data_that_are_refused(runs: dict[str, Path], shards: Path, tmp_path: Path):
    held = [str(tokens(shards.parent))]
    with pytest.raises(UserError, match="bits per byte are defined for a decoder"):
        evaluate(runs["bert"], ["bits_per_byte"], [], held)
    with pytest.raises(UserError, match=r"holds \.docs, \.tokens and no \.txt"):
        evaluate(runs["gpt"], ["knn"], held, held)
    with pytest.raises(DataError, match="no token set is named"):
        evaluate(runs["gpt"], ["bits_per_byte"], [], [])
    other = tokens_of(shards.parent / "texts", tmp_path / "other", vocab=450)
    with pytest.raises(DataError, match=r"was made with another tokenizer .* --tokenizer .*tokenizer.json"):
        evaluate(runs["gpt"], ["bits_per_byte"], [], [str(other)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch": 0}, "bits_per_byte.batch = 0: must be 1 or more"),
        ({"length": 0}, "bits_per_byte.length = 0: must be 1 or more, or null"),
        ({"length": 33}, "bits_per_byte.length = 33: must be at most 32, the number of positions"),
    ],
)
def test_rows_that_a_model_cannot_read(options: dict, message: str, shards: Path, tmp_path: Path):
    run = train(tiny_recipe("gpt", shards, tmp_path / "run", "steps=1", "model.positions=learned"))
    with pytest.raises(UserError, match=message):
        evaluate(
            run / "export" / "1",
            ["bits_per_byte"],
            [],
            [str(tokens(shards.parent))],
            options={"bits_per_byte": options},
        )


def test_texts_whose_rows_cannot_be_read_are_left_out(tmp_path: Path):
    rows = [b"{broken", b'["label"]', b'{"label": "x"}']
    members = [(f"{n}.{kind}", data) for n, row in enumerate(rows) for kind, data in (("txt", b"sea"), ("json", row))]
    write_tar(tmp_path / "0.tar", members)
    index.write(tmp_path, quiet)
    encoder, _ = open_encoder("bytes")
    found = encoder.labelled([str(tmp_path)])
    assert (found.names, found.classes.tolist(), found.left_out, found.passed_over) == (["x"], [0], 2, 0)
    assert torch.equal(found.features[:], bytes_of("sea")[None])


@pytest.mark.slow
def test_a_text_run_is_scored_and_sampled_during_training(shards: Path, tmp_path: Path):
    held, run = tokens(shards.parent), tmp_path / "run"
    scored = [f"eval.val={held}", f"eval.test={held}", "eval.quick=[bits_per_byte]", "eval.final=[bits_per_byte]"]
    options = [
        "eval.prompts=[the sea, '']",
        "steps=20",
        "export=10",
        "data.workers=0",
        "data.batch=16",
        "optim.lr=1e-2",
    ]
    done = unlabeled(
        "train", "demo", "objective=gpt", *tiny("gpt", shards), f"data.train={held}", f"run={run}", *options, *scored
    )
    assert done.returncode == 0, done.stderr
    rows = read_rows(run / "results.jsonl")
    val = {r["step"]: r["value"] for r in rows if (r["split"], r["metric"]) == ("val", "bits_per_byte")}
    assert sorted(val) == [0, 10, 20] and val[20] < val[0]
    assert {r["model"] for r in rows if r["split"] == "test"} == {"untrained", "pretrained"}
    written = read_rows(run / "samples.jsonl")
    assert [(r["step"], r["prompt"]) for r in written] == [(s, p) for s in (0, 10, 20) for p in ("the sea", "")]
    page = report.write(run).read_text()
    for part in ("bits per byte on val", "Samples", "<b>the sea</b>", "token frequencies", "training rows"):
        assert part in page, part
    board = b"".join(path.read_bytes() for path in (run / "tensorboard").glob("events*"))
    assert b"samples/the sea" in board and b"val/bits_per_byte/bits_per_byte" in board
    assert json.loads((run / "export" / "20" / "config.json").read_text())["model_type"]
