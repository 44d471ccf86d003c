"""The attentive probe: its formula, the independence of its heads, continuation after an interruption, and its scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from eval import attentive, probe_training
from eval.attentive import AttentiveHead, Config
from eval.features import Encoder, open_encoder
from pretrain.models.layers import Features


def patches_of(images: Tensor) -> Features:
    """Patches of 8 × 8 pixels, reduced to 2 × 2: [B, 16, 12] for images of 32 pixels."""
    small = F.avg_pool2d(images, 4).unfold(2, 2, 2).unfold(3, 2, 2)  # [B, C, 4, 4, 2, 2]
    tokens = small.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
    return Features(tokens.mean(1), tokens, tokens[:, :0], (4, 4))


def small_encoder(cache: Path, name: str = "patches") -> Encoder:
    encoder = Encoder(patches_of, name, 32, [0.5] * 3, [0.5] * 3)
    encoder.cache = cache
    return encoder


def test_head_equals_multi_head_attention():
    torch.manual_seed(0)
    head = AttentiveHead(12, 5, heads=3).double()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([head.to_q.weight, head.to_kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([head.to_q.bias, head.to_kv.bias]))
        theirs.out_proj.weight.copy_(torch.eye(12))
        theirs.out_proj.bias.zero_()
    x = torch.randn(4, 7, 12, dtype=torch.float64)
    normed = F.layer_norm(x, (12,), head.norm_x.weight, head.norm_x.bias, 1e-5)
    q = head.query.expand(4, -1, -1)
    q = q + theirs(q, normed, normed)[0]
    hidden = F.gelu(head.mlp.fc1(F.layer_norm(q, (12,), head.norm_q.weight, head.norm_q.bias, 1e-5)))
    expected = head.classify(q + head.mlp.fc2(hidden))[:, 0]
    torch.testing.assert_close(head(x), expected, rtol=1e-9, atol=1e-9)
    assert AttentiveHead(10, 3, heads=16).heads == 2 and len(AttentiveHead(12, 3, 3, blocks=4).blocks) == 3


def trained(encoder: Encoder, shards: Path, cfg: Config) -> list[Tensor]:
    found, samples = encoder.labelled([str(shards)]), encoder.check([str(shards)])
    class_of = dict(zip(found.numbers.tolist(), found.classes.tolist(), strict=True))
    heads = attentive.fit(encoder, samples, found.numbers, class_of, len(found.names), cfg)
    return [torch.cat([p.detach().flatten() for p in head.parameters()]) for head in heads]


def test_heads_do_not_depend_on_each_other(shards: Path, tmp_path: Path):
    encoder = small_encoder(tmp_path)
    common = {"epochs": 2, "warmup": 1, "batch": 16}
    together = trained(encoder, shards, Config(**common, rates=[1e-3, 1e-2], decays=[0.0, 1.0]))
    for n, (rate, decay) in enumerate([(1e-3, 0.0), (1e-3, 1.0), (1e-2, 0.0), (1e-2, 1.0)]):
        (alone,) = trained(encoder, shards, Config(**common, rates=[rate], decays=[decay]))
        torch.testing.assert_close(together[n], alone, rtol=1e-4, atol=1e-6)
    assert len({float(each.sum()) for each in together}) == 4


def test_an_interrupted_probe_continues_with_the_same_result(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cfg, encoder = Config(epochs=3, warmup=1, batch=16, rates=[1e-2], decays=[0.1]), small_encoder(tmp_path)
    (expected,) = trained(encoder, shards, cfg)
    monkeypatch.setattr(probe_training, "SAVE_STEPS", 2)
    original, seen = probe_training.batches, list[int]()

    def interrupted(*args: Any) -> Iterator[Any]:
        for step, found in original(*args):
            seen.append(step)
            if len(seen) == 6:
                raise KeyboardInterrupt
            yield step, found

    monkeypatch.setattr(probe_training, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(encoder, shards, cfg)
    (state,) = (tmp_path / probe_training.FOLDER).iterdir()
    assert torch.load(state)["step"] == 4
    (found,) = trained(encoder, shards, cfg)
    assert torch.equal(found, expected) and seen[6:] == [4, 5, 6, 7, 8] and not state.exists()


@pytest.mark.slow
def test_scores(shards: Path, tmp_path: Path):
    cfg = Config(epochs=40, warmup=2, batch=16, rates=[1e-2, 1e-5], decays=[1e-3], hold_out=0.2, augment=False)
    scores = attentive.run(small_encoder(tmp_path), [str(shards)], [str(shards)], cfg)
    assert scores["accuracy"] > 0.9 and scores["rate"] == 1e-2 and scores["decay"] == 1e-3
    with pytest.raises(UserError, match="write one value or more in each"):
        attentive.run(small_encoder(tmp_path), [str(shards)], [str(shards)], Config(rates=[]))
    with pytest.raises(UserError, match="bytes: attentive scores models that read images"):
        attentive.run(open_encoder("bytes")[0], [str(shards)], [str(shards)], cfg)


def test_order_is_a_permutation_for_each_epoch():
    order = probe_training.Order(np.arange(10, 20), seed=3)
    epochs = [[order(10 * epoch + at) for at in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10, 20)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert order(7) == epochs[0][7]  # in any order


def test_schedule():
    factors = [probe_training.cosine(step, 10, warmup=4) for step in range(11)]
    assert factors[:5] == [0, 0.25, 0.5, 0.75, 1.0] and factors[7] == pytest.approx(0.5) and factors[10] < 1e-9
