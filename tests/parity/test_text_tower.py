"""The text model of a dual encoder that starts from given weights (`init.text`): from exports of ours and from folders
of transformers. Both models start from weights, and one of them stays as it is (LiT)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError, UserError
from pretrain.build import build_objective
from pretrain.interchange import text_sides, weights
from pretrain.ops.precision import unit
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.parity.test_models import noise

pytestmark = pytest.mark.slow
BERT = "{name: bert_micro, dim: 32, depth: 2, heads: 2, context: 32}"


@pytest.fixture(scope="module")
def bert(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a text model that has been trained for two steps."""
    size = ["model.dim=32", "model.heads=2", "steps=2", "export=2"]
    return train(tiny_recipe("bert", shards, tmp_path_factory.mktemp("bert") / "run", *size)) / "export" / "2"


@pytest.fixture(scope="module")
def mae(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_recipe("mae", shards, tmp_path_factory.mktemp("mae") / "run", "steps=2", "export=2")) / "export/2"


@pytest.fixture(scope="module")
def both(bert: Path, mae: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a run of CLIP whose two models start from weights, and whose image model stays as it is."""
    start = [f"init.backbone={mae}", f"init.text={bert}", "objective.locked=true"]
    options = [*start, f"objective.text={BERT}", "steps=4", "export=4", "optim.lr=1e-2"]
    run = train(tiny_recipe("clip", shards, tmp_path_factory.mktemp("lit") / "run", *options))
    log = (run / "log.txt").read_text()
    assert f"weights from {bert}" in log and f"weights from {mae}" in log
    return run / "export" / "4"


def started(name: str, shards: Path, text: str, *options: str) -> Any:
    """The objective of a recipe, with the weights from which a run starts."""
    return build_objective(tiny_recipe(name, shards, Path("unused"), f"objective.text={text}", *options), start=True)


def test_both_models_start_from_weights_and_only_the_text_model_is_trained(both: Path, bert: Path, mae: Path):
    source, trained = weights.load_backbone(bert)[0], text_sides.load(both).text
    image, kept = weights.load_backbone(mae)[0].state_dict(), weights.load_backbone(both)[0].state_dict()
    assert all(torch.equal(image[name], tensor) for name, tensor in kept.items())
    moved = {
        name: (tensor - trained.state_dict()[name]).abs().max().item() for name, tensor in source.state_dict().items()
    }
    assert 1e-3 < moved["blocks.0.attn.qkv.weight"] < 0.1  # four steps of at most 1e-2 from the source
    assert moved["head.bias"] == 0  # no loss uses the head


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_text_model_of_an_export_is_loaded(name: str, bert: Path, both: Path, shards: Path):
    for folder, expected in ((bert, weights.load_backbone(bert)[0]), (both, text_sides.load(both).text)):
        text = started(name, shards, BERT, f"init.text={folder}").text
        assert text.loaded
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(text.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_a_bert_of_transformers_is_loaded_and_does_not_see_the_padding(shards: Path, tmp_path: Path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, vocab_size=512, max_position_embeddings=24)
    theirs = transformers.BertForMaskedLM(config).eval()
    noise(theirs)
    theirs.save_pretrained(tmp_path)
    options = "{name: bert_micro, dim: 32, depth: 2, heads: 2, mlp_width: 64, vocab_size: 512, context: 24}"
    model = started("clip", shards, options, f"init.text={tmp_path}", "data.length=24").eval()
    ids, last = torch.randint(3, 512, (3, 24)), torch.tensor([4, 23, 0])
    seen = (torch.arange(24) <= last.unsqueeze(1)).long()
    with torch.no_grad():
        expected = theirs.bert(input_ids=ids, attention_mask=seen).last_hidden_state[torch.arange(3), last]
        side = model.exports()["model"].text_side
        torch.testing.assert_close(side(ids, last), unit(model.text_projection(expected)), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(bert: Path, mae: Path, shards: Path):
    with pytest.raises(
        UserError,
        match=r"holds a TextEncoder, but objective.text.name = clip_text is a Decoder; write objective.text=bert_micro",
    ):
        started("clip", shards, "{name: clip_text, dim: 32, depth: 2, heads: 2}", f"init.text={bert}")
    with pytest.raises(UserError, match=r"objective.text.depth is 1 here and 2 there; write objective.text.depth=2"):
        started("clip", shards, "{name: bert_micro, dim: 32, depth: 1, heads: 2, context: 32}", f"init.text={bert}")
    with pytest.raises(UserError, match=r"holds a ViT, but objective.text.name = bert_micro is a TextEncoder"):
        started("clip", shards, BERT, f"init.text={mae}")
    with pytest.raises(ConfigError, match=r"init.text and init.run are both given"):
        started("clip", shards, BERT, f"init.text={bert}", "init.run=a")
    with pytest.raises(ConfigError, match=r"objective mae has no text model beside `model`; write init.backbone"):
        tiny_recipe("mae", shards, Path("unused"), f"init.text={bert}")
