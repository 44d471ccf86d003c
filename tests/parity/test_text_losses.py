"""The text objectives: losses and gradients in float64 compared with naive loops and with the losses of
transformers; statistics of the tokens that BERT masks and T5 cuts; and means over the targets of a global batch for
any distribution over micro-batches."""

from __future__ import annotations

import collections
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from data_pipeline.parts.part import About
from data_pipeline.shards.token_rows import next_tokens
from data_pipeline.shards.vocabulary import Vocabulary
from pretrain.interchange import export
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.objectives import finder as objectives
from pretrain.objectives.base import Objective
from pretrain.ops.cross_entropy import IGNORED
from pretrain.parallel.engine import Engine
from tests.conftest import tiny_recipe
from tests.parity.test_models import noise

VOCABULARY = Vocabulary(96, bos=3, eos=3, pad=1, mask=2, sentinels=tuple(range(95, 80, -1)))
MODELS = {
    "gpt": families.Decoder(vocab_size=96, dim=32, depth=2, heads=4, context=24, kv_heads=2),
    "bert": families.TextEncoder(vocab_size=96, dim=32, depth=2, heads=4, context=24),
    "t5": families.EncoderDecoder(
        vocab_size=96, dim=32, depth=2, heads=4, head_dim=8, mlp_width=48, context=24, buckets=8, max_distance=12
    ),
}
PRESETS = {"gpt": "gpt", "bert": "bert_base", "t5": "t5_small"}


def build(name: str, options: dict[str, Any] | None = None, body: dict[str, Any] | None = None) -> Objective:
    """A model in float64, with noise on every parameter."""
    kind = objectives.find(name)
    cfg = MODELS[name].replace(**(body or {}))
    cfg.name = PRESETS[name]
    torch.manual_seed(0)
    made = kind(config_of(name, options), lambda **changes: build_model(cfg.replace(**changes)))
    noise(made)
    return made.double().eval()


def config_of(name: str, options: dict[str, Any] | None = None) -> Any:
    return objectives.config_class(name)[0](**(options or {}))


def row_of(length: int, seed: int, ends: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """length + 1 tokens. The next document begins at each position in `ends`; if the last number is negative,
    padding follows."""
    tokens = np.random.default_rng(seed).integers(10, 80, length + 1)
    documents = np.searchsorted(np.abs(ends), np.arange(length + 1), side="right").astype(np.int32)
    if ends and ends[-1] < 0:
        documents[-ends[-1] :] = -1
    return {"tokens": tokens, "documents": documents}


def batch_of(name: str, rows: list[dict[str, np.ndarray]], masked: bool = True, options: dict[str, Any] | None = None):
    view = objectives.find(name).views(
        config_of(name, options), About(length=len(rows[0]["tokens"]) - 1, vocabulary=VOCABULARY, document_mask=masked)
    )
    parts = [view(row, lambda k, n=n: np.random.default_rng([n, k])) for n, row in enumerate(rows)]
    return {key: torch.from_numpy(np.stack([part[key] for part in parts])) for key in parts[0]}


def naive(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """The loss, computed target by target."""
    terms = []
    for row, wanted in zip(logits, targets.tolist(), strict=True):
        for z, target in zip(row, wanted, strict=True):
            if target == IGNORED:
                continue
            normaliser = (z - z.max()).exp().sum().log() + z.max()
            terms.append(normaliser - z[target] + z_loss * normaliser**2)
    return torch.stack(terms).mean()


def logits_of(name: str, model: Objective, batch: dict[str, Tensor]) -> Tensor:
    body = model.encoder()
    if name == "t5":
        memory = body(batch["tokens"], documents=batch["documents"]).tokens
        return body.head(body.decoder(batch["decoder_tokens"], memory, batch["documents"] >= 0))
    hidden = body(batch["tokens"], documents=batch.get("documents")).tokens
    if name == "bert":
        hidden = torch.stack([row[places] for row, places in zip(hidden, batch["places"], strict=True)])
    return body.head(hidden)


def compare(model: Objective, ours: Tensor, theirs: Tensor) -> None:
    """Compare values and the gradients of every parameter."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- values and gradients
ROWS = [row_of(24, 1, (7, 15, -20)), row_of(24, 2), row_of(24, 3, (12,))]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("options", "body"),
    [({}, {}), ({"z_loss": 1e-2}, {}), ({"z_loss": 1e-2}, {"softcap": 3.0}), ({}, {"tied": True, "windows": [5, 0]})],
)
def test_gpt(masked: bool, options: dict, body: dict):
    model, batch = build("gpt", options, body), batch_of("gpt", ROWS, masked)
    compare(model, model(batch, 0)[0], naive(logits_of("gpt", model, batch), batch["targets"], **options))


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_bert_and_t5(name: str):
    rows = ROWS if name == "bert" else [row_of(24, 1), row_of(24, 2, (-19,)), row_of(24, 3)]
    model, batch = build(name), batch_of(name, rows, masked=name == "bert")
    compare(model, model(batch, 0)[0], naive(logits_of(name, model, batch), batch["targets"]))


def test_gpt_predicts_within_documents():
    """The loss of a packed row is that of its separate documents, in which each token except the first is predicted
    once."""
    model, packed = build("gpt"), row_of(24, 5, (7, 15))
    tokens, total, count = packed["tokens"], 0.0, 0
    for begin, end in ((0, 7), (7, 15), (15, 25)):
        alone = torch.from_numpy(tokens[begin:end])[None]
        logits = model.encoder().head(model.encoder()(alone[:, :-1]).tokens)
        total = total + naive(logits, alone[:, 1:]) * (end - begin - 1)
        count += end - begin - 1
    compare(model, model(batch_of("gpt", [packed]), 0)[0], total / count)
    assert (next_tokens(tokens, packed["documents"]) == IGNORED).nonzero()[0].tolist() == [6, 14]


@pytest.mark.parametrize("name", ["gpt", "bert", "t5"])
def test_transformers_has_the_same_loss(name: str, tmp_path: Path):
    """For the same batch, compared with the loss that transformers computes from labels."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    body = {"gpt": {"qk_norm": False}}.get(name, {})
    model = build(name, body=body)
    rows = [row_of(24, 1), row_of(24, 2), row_of(24, 3)]
    batch = batch_of(name, rows, masked=name == "bert")
    theirs = _theirs(transformers, name, model, tmp_path / "out")
    if name == "gpt":
        whole = torch.from_numpy(np.stack([row["tokens"] for row in rows]))
        other = theirs(whole, labels=whole).loss
    elif name == "bert":
        labels = torch.full_like(batch["tokens"], IGNORED)
        for row, places, targets in zip(labels, batch["places"], batch["targets"], strict=True):
            row[places[targets != IGNORED]] = targets[targets != IGNORED]
        other = theirs(batch["tokens"], attention_mask=batch["documents"] >= 0, labels=labels).loss
    else:
        seen = batch["documents"] >= 0
        other = theirs(batch["tokens"], attention_mask=seen.long(), labels=batch["targets"]).loss
    ours = model(batch, 0)[0]
    torch.testing.assert_close(ours, other.double(), rtol=1e-6, atol=0)  # theirs is rounded to fp32 on its way
    (mine,) = torch.autograd.grad(ours, [_embedding(model)])
    (other_gradient,) = torch.autograd.grad(other, [theirs.get_input_embeddings().weight])
    torch.testing.assert_close(mine, other_gradient, rtol=1e-5, atol=1e-8)


def _embedding(model: Objective) -> Tensor:
    return next(p for name, p in model.named_parameters() if "embed" in name and p.shape == (96, 32))


def _theirs(transformers: Any, name: str, model: Objective, folder: Path) -> Any:
    """transformers' model with the same weights, through a folder, which stores them in fp32."""
    export.write(folder, model.encoder().float(), {"step": 1, "objective": name, "pool": "mean"})
    kind = {"gpt": "AutoModelForCausalLM", "bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}[name]
    found = getattr(transformers, kind).from_pretrained(folder).double().eval()
    model.double()
    if name == "t5":
        found.config.decoder_start_token_id = found.config.pad_token_id = VOCABULARY.pad
    return found


# ---------------------------------------------------------------- what is hidden, and what is cut
def test_bert_hides_its_share_and_80_10_10():
    """Exactly 15 % of the ordinary tokens, uniformly; never padding or a special token; different ones each time; 80
    / 10 / 10 within 4 standard errors."""
    length, rounds = 100, 3000
    view = objectives.find("bert").views(
        config_of("bert"), About(length=length, vocabulary=VOCABULARY, document_mask=True)
    )
    row = row_of(length, 0, (40, -90))
    row["tokens"][[0, 40]] = VOCABULARY.bos
    free = np.setdiff1d(np.arange(90), [0, 40])
    where, fates, others = np.zeros(length), collections.Counter(), collections.Counter()
    for n in range(rounds):
        out = view(row, lambda k, n=n: np.random.default_rng([n, k]))
        valid = out["targets"] != IGNORED
        places = out["places"][valid]
        assert len(places) == len(set(places)) == round(0.15 * len(free)) and set(places) <= set(free)
        assert (out["targets"][valid] == row["tokens"][places]).all()
        untouched = np.setdiff1d(np.arange(length), places)
        assert (out["tokens"][untouched] == row["tokens"][:length][untouched]).all()
        where[places] += 1
        for place in places:
            seen, was = out["tokens"][place], row["tokens"][place]
            fates["mask" if seen == VOCABULARY.mask else "same" if seen == was else "other"] += 1
            if seen not in (VOCABULARY.mask, was):
                others[seen] += 1
    total = sum(fates.values())
    ordinary = int((~VOCABULARY.special).sum())
    for fate, share in {"mask": 0.8, "other": 0.1 * (1 - 1 / ordinary), "same": 0.1 * (1 + 1 / ordinary)}.items():
        assert abs(fates[fate] / total - share) < 4 * math.sqrt(share * (1 - share) / total), (
            fate,
            fates[fate] / total,
        )
    assert stats.chisquare(where[free]).pvalue > 1e-4
    assert set(others) <= set(np.flatnonzero(~VOCABULARY.special)) and len(others) == ordinary


def test_t5_cuts_spans_of_3_and_both_sides_give_the_text_back():
    length, rounds = 200, 800
    view = objectives.find("t5").views(config_of("t5"), About(length=length, vocabulary=VOCABULARY))
    first = np.zeros(length)
    spans: list[int] = []
    for n in range(rounds):
        row = row_of(length, n)
        out = view(row, lambda k, n=n: np.random.default_rng([n, k]))
        again, runs = restored(out)
        assert again == row["tokens"][:length].tolist()
        assert len(runs) == 10 and sum(map(len, runs)) == 30 and min(map(len, runs)) >= 1  # 15 %, spans of 3 on average
        assert (out["tokens"] != VOCABULARY.pad).all() and (out["targets"] != IGNORED).all()
        assert len(out["tokens"]) == 200 - 30 + 10 + 1 and len(out["targets"]) == 30 + 10 + 1
        spans += map(len, runs)
        first += cut_of(out, length)
    # compositions of 30 into 10 parts, all alike: a part is k with C(29 − k, 8) / C(29, 9)
    expected = np.array([math.comb(29 - k, 8) / math.comb(29, 9) for k in range(1, 22)])
    found = np.bincount(spans, minlength=22)[1:22]
    tail = expected * len(spans) < 5
    found, expected = np.append(found[~tail], found[tail].sum()), np.append(expected[~tail], expected[tail].sum())
    assert stats.chisquare(found, expected * len(spans)).pvalue > 1e-4
    assert first[0] == 0 and first[-1] == rounds  # a text begins with what is kept and ends with what is cut
    assert abs(first[40:160].mean() / rounds - 0.15) < 0.01


def restored(out: dict[str, np.ndarray]) -> tuple[list[int], list[list[int]]]:
    """(text, spans that were cut): each span is put back at its sentinel."""
    written = [token for token in out["targets"].tolist() if token != IGNORED]
    read = out["tokens"][out["documents"] >= 0].tolist()
    assert written[-1] == read[-1] == VOCABULARY.eos
    assert out["decoder_tokens"].tolist()[: len(written)] == [VOCABULARY.pad, *written[:-1]]
    runs: list[list[int]] = []
    for token in written[:-1]:
        if token in VOCABULARY.sentinels:
            assert token == VOCABULARY.sentinels[len(runs)]
            runs.append([])
        else:
            runs[-1].append(token)
    text: list[int] = []
    used = 0
    for token in read[:-1]:
        if token in VOCABULARY.sentinels:
            assert token == VOCABULARY.sentinels[used]
            text += runs[used]
            used += 1
        else:
            text.append(token)
    return text, runs


def cut_of(out: dict[str, np.ndarray], length: int) -> np.ndarray:
    """1 for the tokens of the text that were cut."""
    _, runs = restored(out)
    cut, place, used = np.zeros(length), 0, 0
    for token in out["tokens"][:-1].tolist():
        if token in VOCABULARY.sentinels:
            cut[place : place + len(runs[used])] = 1
            place, used = place + len(runs[used]), used + 1
        else:
            place += 1
    return cut


# ---------------------------------------------------------------- means over the global batch
@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_micro_batches_with_few_targets_weigh_less(name: str, shards: Path, tmp_path: Path):
    """Accumulated losses and gradients are those of one mean over all targets, not of a mean of means."""
    micro = ["parallel.micro_batch=1", "data.batch=3", "optim.clip=null"]
    cfg = tiny_recipe(name, shards, tmp_path, *micro)
    engine = Engine(build(name), cfg, torch.device("cpu"))
    rows = [row_of(24, 1, (-3,)), row_of(24, 2), row_of(24, 3, (-12,))]
    whole = batch_of(name, rows)
    parts = [{key: value[n : n + 1] for key, value in whole.items()} for n in range(3)]
    expected = naive(logits_of(name, engine.objective, whole), whole["targets"])
    losses = []
    for n, batch in enumerate(engine.micro_batches(parts)):
        with engine.microbatch(last=n == 2):
            loss, _ = engine.forward(batch, 0)
            engine.backward(loss)
        losses.append(loss.detach())
    torch.testing.assert_close(
        torch.stack(losses).mean(), expected.detach(), rtol=1e-6, atol=0
    )  # counts are shared in fp32
    parameters = list(engine.objective.parameters())
    for p, wanted in zip(parameters, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-6, atol=1e-9)
    means = torch.stack([naive(logits_of(name, engine.objective, p), p["targets"]) for p in parts]).mean()
    assert abs(means - expected) > 1e-4


def test_a_batch_without_targets_counts_for_nothing():
    model, row = build("gpt"), row_of(24, 1)
    row["documents"] = np.arange(25, dtype=np.int32)  # documents of one token each: nothing to predict
    loss = model(batch_of("gpt", [row]), 0)[0]
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
