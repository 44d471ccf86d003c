"""The Conformer and BEST-RQ against transformers' Wav2Vec2BertModel and plain formulas, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel, Wav2Vec2BertConfig, Wav2Vec2BertModel

from common.errors import ConfigError, UserError
from data_pipeline.parts.audio import Audio
from data_pipeline.parts.part import About
from pretrain.build import build_objective, noise_batch, placed
from pretrain.interchange import export, export_formats, model_card, weights
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.objectives import bestrq, finder
from pretrain.objectives.base import Objective
from pretrain.ops.cross_entropy import IGNORED
from tests.conftest import tiny_recipe
from tests.data.sounds import tone

SIZES: dict[str, Any] = {
    "mels": 8,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "kernel": 5,
    "left": 3,
    "right": 2,
    "mlp_width": 24,
}


def conformer(**changes: Any) -> Any:
    cfg = families.Conformer(**SIZES | changes)
    cfg.name = "conformer"
    torch.manual_seed(0)
    return build_model(cfg)


def randomized(model: Any) -> Any:
    """All parameters drawn anew, so that norms and biases matter, too."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def written(folder: Path, model: Any, **audio: Any) -> Path:
    about = {"step": 1, "objective": "bestrq", "pool": "cls"}
    export.write(folder, model, about | {"audio": {"sample_rate": 16000, "seconds": 2.0, "mels": 8, **audio}})
    model_card.write(folder)
    return folder


# ---------------------------------------------------------------- the network
@pytest.mark.parametrize("stack", [1, 2, 4])
def test_the_conformer_equals_that_of_transformers(stack: int, tmp_path: Path):
    """Outputs and gradients, with padding after some recordings; and transformers' extractor makes our input."""
    ours = randomized(conformer(stack=stack)).double()
    theirs, info = AutoModel.from_pretrained(written(tmp_path / "1", ours), output_loading_info=True)
    assert isinstance(theirs, Wav2Vec2BertModel) and not any(info.values())
    theirs = theirs.double()
    ours.float().double()  # the file has 32 bits
    x = torch.randn(3, 11, stack * 8, dtype=torch.float64)
    valid = torch.arange(11) < torch.tensor([[11], [7], [2]])
    outputs = []
    for model, call in (
        (ours, lambda: ours(x, valid=valid).tokens),
        (theirs, lambda: theirs(input_features=x, attention_mask=valid).last_hidden_state),
    ):
        model.zero_grad()
        out = call()
        (out * valid.unsqueeze(-1)).square().sum().backward()
        state = {key: p.grad for key, p in model.named_parameters()}
        outputs.append((out, state))
    (a, our_grads), (b, their_grads) = outputs
    assert torch.allclose(a[valid], b[valid], atol=1e-9)
    renamed = export.transformers.write(ours.cfg, our_grads)[1]
    assert renamed.keys() == their_grads.keys()
    assert all(torch.allclose(renamed[key], their_grads[key], atol=1e-7) for key in renamed)
    features = ours(x, valid=valid)
    means = torch.stack([row[mask].mean(0) for row, mask in zip(features.tokens, valid, strict=True)])
    assert torch.allclose(features.cls, means) and features.grid == (11,)
    several = ours(x, valid=valid, layers=2)
    assert several.tokens.shape == (3, 11, 32) and torch.equal(several.tokens[..., 16:], features.tokens)


def lines_of_card(folder: Path, inputs: Tensor) -> Tensor:
    """`features` after the lines of Python of a model card, which read `inputs`."""
    lines = [line[4:] for line in (folder / "README.md").read_text().splitlines() if line.startswith("    ")]
    known = {"FOLDER": folder, "inputs": inputs}
    with torch.no_grad():
        exec("\n".join(lines), known)
    return known["features"]


def test_a_waveform_gives_the_same_features_in_transformers(tmp_path: Path):
    ours = conformer().eval()
    folder = written(tmp_path / "1", ours)
    extractor, theirs = AutoFeatureExtractor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    noise = np.random.default_rng(0).normal(0, 2000, 20000)
    samples = (noise + tone(700, 1.25)).astype(np.int16)
    with torch.no_grad():
        expected = theirs(**extractor(samples / 32768, sampling_rate=16000, return_tensors="pt")).last_hidden_state
        part = Audio(seconds=1.25, mels=8)
        frames = torch.tensor([part.frames])
        found = ours(part.place(torch.from_numpy(samples)[None], torch.device("cpu"), frames=frames)).tokens
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=2e-3)
    card = (folder / "README.md").read_text()
    assert "with 8 bands of audio at 16000 Hz" in card and "AutoFeatureExtractor" in card
    assert not (written(tmp_path / "2", ours, sample_rate=8000) / "preprocessor_config.json").exists()
    found = lines_of_card(tmp_path / "2", torch.randn(1, 5, ours.cfg.stack * 8))
    assert found.shape == (1, 5, SIZES["dim"])


@pytest.mark.slow
def test_an_export_is_opened_again_in_every_format(tmp_path: Path):
    lines = export_formats.release(written(tmp_path / "1", conformer()), ["transformers", "torch"])
    assert len(lines) == 2 and all("opened again" in line for line in lines)
    with pytest.raises(UserError, match="has ViTs and ConvNeXts only"):
        export_formats.release(tmp_path / "1", ["official"])


@pytest.mark.parametrize("positions", ["rope", "sincos", "learned"])
def test_a_vit_on_spectrograms_is_opened_by_transformers(positions: str, tmp_path: Path):
    """For spectrograms of any length, and its card names how they are made."""
    cfg = families.SpectrogramViT(image_size=32, patch_size=8, dim=32, depth=2, heads=2, positions=positions)
    cfg.name = "spectrogram_vit"
    torch.manual_seed(0)
    ours = build_model(cfg).eval()
    folder = written(tmp_path / "1", ours, mels=32, mean=[16.5], std=[9.1])
    theirs = AutoModel.from_pretrained(folder).eval()
    again, about = weights.load_backbone(folder)
    for columns in (4, 7):
        x = torch.randn(2, 1, 32, 8 * columns)
        with torch.no_grad():
            features, found = ours(x), theirs(x).last_hidden_state
            assert features.grid == (4, columns) and torch.equal(again(x).tokens, features.tokens)
        assert torch.allclose(found[:, 1:], features.tokens, atol=1e-4)
    assert about["audio"] == {"sample_rate": 16000, "seconds": 2.0, "mels": 32, "mean": [16.5], "std": [9.1]}
    assert "mean 16.5, std 9.1" in (folder / "README.md").read_text()
    assert torch.equal(lines_of_card(folder, x), found)


@pytest.mark.slow
def test_weights_of_transformers_are_read(tmp_path: Path):
    fields = export.transformers.write(conformer(stack=2).cfg, {})[0]
    config = Wav2Vec2BertConfig(**{k: v for k, v in fields.items() if k != "model_type"}, vocab_size=9)
    config.mask_time_prob = 0.05  # as in the released model, which has a vector for masked frames
    theirs = randomized(Wav2Vec2BertModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours, about = weights.load_backbone(tmp_path)
    assert (ours.cfg.stack, ours.cfg.mels, about["step"]) == (2, 8, None)
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        assert torch.allclose(ours(x).tokens, theirs(x).last_hidden_state, atol=1e-5)
    (tmp_path / "preprocessor_config.json").write_text('{"stride": 5}')
    with pytest.raises(UserError, match="feature_projection_input_dim = 16 is no multiple of the stride 5"):
        weights.load_backbone(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"stride": 0}')
    with pytest.raises(UserError, match="states no valid stride"):
        weights.load_backbone(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"position_embeddings_type": "rotary"}))
    with pytest.raises(UserError, match="position_embeddings_type = 'rotary' cannot be read"):
        weights.load_backbone(tmp_path)


# ---------------------------------------------------------------- the loss
def made(**options: Any) -> Any:
    cfg = bestrq.Config(**{"codebook_size": 13, "code_dim": 5, "codebooks": 2, **options})
    torch.manual_seed(0)
    return bestrq.BESTRQ(cfg, lambda **changes: conformer(**changes)).double()


def random_batch(count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    lengths = torch.tensor([[10], [10], [7], [4]])[:count]
    valid = torch.arange(10) < lengths
    masked = (draw(count, 10) > 0.3) & valid
    return {
        "audio": draw(count, 40, 8),
        "noise": draw(count, 10, 32) * 0.1,
        "valid": valid,
        "targets": torch.where(masked, 0, IGNORED),
    }


def naive(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """2202.01855, eq. 2, group by group, and code by code."""
    terms = []
    for audio, noise, valid, targets in zip(*(batch[k] for k in ("audio", "noise", "valid", "targets")), strict=True):
        groups = [audio[4 * u : 4 * u + 4].reshape(-1) for u in range(10)]
        masked = [u for u in range(10) if targets[u] == 0]
        given = torch.stack([noise[u] if u in masked else groups[u] for u in range(10)])
        hidden = model.backbone(given[None], valid=valid[None]).tokens[0]
        for u in masked:
            for c, head in enumerate(model.heads):
                projected = groups[u] @ model.quantizer.projection[c]
                projected = projected / math.sqrt(float(projected @ projected))
                vectors = model.quantizer.vectors[c]
                distances = [float((projected - v / math.sqrt(float(v @ v))).square().sum()) for v in vectors]
                logits = head.weight @ hidden[u] + head.bias
                terms.append(logits.exp().sum().log() - logits[min(range(13), key=distances.__getitem__)])
    return torch.stack(terms).mean()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_best_rq_is_the_papers_formula():
    model, batch = made(), random_batch()
    loss, expected = model(batch, 0)[0], naive(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    assert all(torch.allclose(ours[k], theirs[k], rtol=1e-6, atol=1e-10) for k in ours)
    assert not [name for name, _ in model.named_parameters() if name.startswith("quantizer")]
    assert {"quantizer.projection", "quantizer.vectors"} <= model.state_dict().keys()


def test_padding_changes_nothing():
    """What lies in the padding of a recording has no influence on its loss."""
    model, batch = made(), random_batch()
    other = {key: value.clone() for key, value in batch.items()}
    other["audio"][2, 28:] = 5.0
    other["noise"][2, 7:] = -3.0
    assert torch.equal(model(batch, 0)[0], model(other, 0)[0])
    other["audio"][2, :28] = other["audio"][2, :28].flip(0)
    assert not torch.equal(model(batch, 0)[0], model(other, 0)[0])


def test_recordings_with_padding_give_the_loss_and_the_gradient_that_they_give_alone():
    """The sum over a batch of recordings of different lengths equals the sum over the recordings one by one."""
    model, batch = made(), random_batch()
    frames = batch["valid"].sum(1) * 4 - torch.tensor([0, 1, 0, 1])  # a last group may lack a frame
    for row, count in zip(batch["audio"], frames.tolist(), strict=True):
        row[count:] = 0  # as `Audio.place` makes it

    def results(batches: list[dict[str, Tensor]]) -> list[Tensor]:
        model.zero_grad()
        loss = sum(model(each | {"count": torch.tensor(1.0)}, 0)[0] for each in batches)
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    alone = []
    for n, count in enumerate(frames.tolist()):
        groups = int(batch["valid"][n].sum())
        one = {key: value[n : n + 1, :groups] for key, value in batch.items()}
        alone.append(one | {"audio": batch["audio"][n : n + 1, :count]})
    for padded, single in zip(results([batch]), results(alone), strict=True):
        assert torch.allclose(padded, single, rtol=1e-10, atol=1e-12)


def test_the_codes_of_noise_are_spread_over_a_codebook():
    quantizer = bestrq.Quantizer(1, 256, 32, 16)
    codes = quantizer(torch.randn(4096, 32, generator=torch.Generator().manual_seed(0)))[:, 0]
    shares = torch.bincount(codes, minlength=256) / 4096
    assert (shares > 0).sum() > 240 and shares.max() < 0.05


def views(seconds: float, **options: Any) -> tuple[Any, About]:
    about = About(sample_rate=16000, samples=round(16000 * seconds), mels=8, stack=4)
    return bestrq.BESTRQ.views(bestrq.Config(**options), about), about


def made_views(view: Any, samples: int, seed: int) -> dict[str, np.ndarray]:
    sample = {"audio": np.full(samples, 7, np.int16)}
    return view(sample, lambda k: np.random.default_rng([seed, k]))


def test_spans_begin_at_the_papers_rate():
    """16 s at 0.01 and 400 ms: a frame is masked with probability 1 − 0.99⁴⁰; noise has the given deviation."""
    view, _ = views(16)
    shares, noise = [], []
    for seed in range(60):
        arrays = made_views(view, 16 * 16000, seed)
        masked = arrays["targets"] == 0
        assert arrays["valid"].all() and not arrays["noise"][~masked].any()
        runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], masked, [0]]))))[::2]
        assert (runs[:-1] >= 10).all()  # only the last span may be cut off
        shares.append(masked.mean())
        noise.append(arrays["noise"][masked].astype(float).std())
    assert np.mean(shares) == pytest.approx(1 - 0.99**40, abs=0.03)
    assert np.mean(noise) == pytest.approx(0.1, rel=0.02)


def test_short_recordings_are_padded_and_have_a_mask():
    view, _ = views(2, mask_probability=1e-6, mask_frames=8)
    for samples, count in ((8000, 12), (3000, 4), (1600, 2)):
        arrays = made_views(view, samples, samples)
        masked = arrays["targets"] == 0
        assert arrays["valid"].sum() == count and arrays["valid"][:count].all() and not masked[count:].any()
        assert 1 <= masked.sum() <= 2
        assert arrays["audio"].shape == (32000,) and not arrays["audio"][samples:].any()
    with pytest.raises(ValueError, match=r"data\.seconds = 0\.03: is shorter than a token"):
        views(0.03)


def test_the_quantizer_is_drawn_from_the_seed(shards: Path, tmp_path: Path):
    def built(*overrides: str) -> Objective:
        return build_objective(tiny_recipe("bestrq", shards, tmp_path / "run", *overrides))

    first, again, other = built(), built(), built("seed=5")
    for name in ("projection", "vectors"):
        one, two, three = (m.get_submodule("quantizer").get_buffer(name) for m in (first, again, other))
        assert torch.equal(one, two) and not torch.equal(one, three)
    assert "arXiv" in finder.purpose("bestrq")


# ---------------------------------------------------------------- the masked autoencoder
def test_audio_mae_predicts_the_patches_of_a_spectrogram(shards: Path, tmp_path: Path):
    """From the waveforms of a batch to the loss, patch by patch; a spectrogram is wider than high."""
    cfg = tiny_recipe("audio_mae", shards, tmp_path / "run", "model.image_size=16", "data.seconds=0.5")
    model: Any = build_objective(cfg)
    host = noise_batch(cfg, model, 3)
    assert host["image.frames"].tolist() == [48] * 3
    host["image.frames"][1] = 20  # the end of a shorter recording
    batch = placed(model, host, torch.device("cpu"))
    features = Audio(seconds=0.5, mels=16).features(host["image"], torch.device("cpu"))
    image = ((features[:, :48] - 13) / 6).transpose(1, 2)  # 48 of 48.5 frames: 6 patches of 8
    image[1, :, 20:] = 0
    assert batch["image"].shape == (3, 1, 16, 48) and torch.allclose(batch["image"][:, 0], image)
    assert host["keep"].shape == (3, 2)  # of 2 rows and 6 columns, a fifth
    prediction, dropped = model.reconstruct(batch["image"], batch["keep"])
    assert {*dropped[0].tolist()} == {*range(12)} - {*batch["keep"][0].tolist()}
    terms = []
    for picture, guesses, places in zip(image, prediction, dropped, strict=True):
        for guess, place in zip(guesses, places.tolist(), strict=True):
            row, column = divmod(place, 6)
            patch = picture[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].reshape(-1)
            patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            terms.append((guess - patch).square().mean())
    assert model(batch, 0)[0].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    view = type(model).views(cfg.objective, About(sample_rate=16000, samples=8000, mels=16, patch_size=8))
    assert view({"audio": np.ones(4800, np.int16)}, np.random.default_rng)["image.frames"] == 28  # 0.3 s
    assert "norm_pix" in finder.attributes("audio_mae")  # the file of MAE reads it, so that a run accepts the option
    for wrong, says in (
        ("data.mean=[1, 2, 3]", "a spectrogram has one channel, so write one value"),
        ("model.patch_size=16", "data.seconds = 0.1: is shorter than a patch of the model"),
    ):
        with pytest.raises(ConfigError, match=says):
            build_objective(tiny_recipe("audio_mae", shards, tmp_path / "run", "data.seconds=0.1", wrong))
