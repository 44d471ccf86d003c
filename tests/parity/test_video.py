"""Models of clips, VideoMAE and V-JEPA 2, compared with transformers and with plain formulas in float64."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

from common.errors import ConfigError, UserError
from common.schedules import Schedule
from data_pipeline.parts.part import About
from data_pipeline.parts.video_clip import Clip
from data_pipeline.views.augmentations import center, generators
from data_pipeline.views.clip_masks import BlocksOverTime
from pretrain.interchange import export, model_card
from pretrain.interchange.weights import load_backbone, load_into
from pretrain.models import families, presets
from pretrain.models.build import build_model
from pretrain.models.positions import clip_table
from pretrain.objectives import videomae, vjepa2
from pretrain.ops.patchify import tubelets, untubelets
from pretrain.recipes.sections import Data
from tests.parity.test_losses import noise, normal

SIZES = {"image_size": 32, "patch_size": 8, "frames": 4, "dim": 48, "depth": 2, "heads": 2}
VIDEOMAE = families.VideoViT(**SIZES, positions="sequence", key_bias=False)
VJEPA2 = families.VideoViT(**SIZES, positions="rope")
for cfg in (VIDEOMAE, VJEPA2):
    cfg.name = "video_vit"
GRID, TOKENS = (2, 4, 4), 32
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def body(cfg: families.VideoViT, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return noise(build_model(cfg), seed).eval()


def written(encoder: Any, folder: Path) -> Path:
    export.write(folder, encoder, {"step": 1, "objective": "mae", "pool": "mean", "fps": 4.0}, MEAN, STD)
    return folder


# ---------------------------------------------------------------- models
@pytest.mark.parametrize("cfg", [VIDEOMAE, VJEPA2], ids=["videomae", "vjepa2"])
def test_transformers_opens_exports(cfg: families.VideoViT, tmp_path: Path):
    encoder, clips = body(cfg), normal(2, 4, 3, 32, 32).float()
    folder = written(encoder, tmp_path / "export")
    theirs, info = hf.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is (hf.VideoMAEModel if cfg is VIDEOMAE else hf.VJEPA2Model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        ours, found = encoder(clips), theirs.eval()(clips).last_hidden_state
        torch.testing.assert_close(ours.tokens, found, rtol=1e-4, atol=1e-5)
        assert ours.grid == GRID
        torch.testing.assert_close(ours.cls, found.mean(1), rtol=1e-4, atol=1e-5)
        again, about = load_backbone(folder)
        assert torch.equal(again(clips).tokens, ours.tokens) and about["fps"] == 4.0
    card = model_card.write(folder).read_text()
    assert "AutoVideoProcessor" in card and "4 of each second" in card
    assert ("no part of this export" in card) == (cfg is VJEPA2)


@pytest.mark.parametrize("cfg", [VIDEOMAE, VJEPA2], ids=["videomae", "vjepa2"])
def test_the_video_processor_prepares_frames_as_evaluation_does(cfg: families.VideoViT, tmp_path: Path):
    folder = written(body(cfg), tmp_path / "export")
    frames = list(np.random.default_rng(0).integers(0, 256, (4, 32, 40, 3), dtype=np.uint8))
    given = hf.AutoVideoProcessor.from_pretrained(folder)(frames, return_tensors="pt")
    (name,) = given
    assert name == ("pixel_values" if cfg is VIDEOMAE else "pixel_values_videos")
    pixels = torch.from_numpy(np.stack([center(frame, 32) for frame in frames])).float() / 255
    expected = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(given[name][0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["videomae", "vjepa2"])
def test_weights_of_transformers_folders(kind: str, tmp_path: Path):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    if kind == "videomae":
        more = {"num_frames": 4, "image_size": 32, "intermediate_size": 96, "use_mean_pooling": False}
        theirs: Any = hf.VideoMAEForPreTraining(hf.VideoMAEConfig(**sizes, **more, layer_norm_eps=1e-6))
    else:
        more = {"frames_per_clip": 4, "crop_size": 32, "mlp_ratio": 2.0, "pred_hidden_size": 12}
        theirs = hf.VJEPA2Model(hf.VJEPA2Config(**sizes, **more, pred_num_attention_heads=2))
    theirs = noise(theirs, 1).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = load_backbone(tmp_path)
    clips = normal(2, 4, 3, 32, 32).float()
    encoder = theirs.videomae if kind == "videomae" else theirs
    with torch.no_grad():
        torch.testing.assert_close(ours(clips).tokens, encoder(clips).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_class_of_transformers_keeps_our_layout(tmp_path: Path):
    cfg = VIDEOMAE.replace(positions="sincos")
    encoder, clips = body(cfg), normal(2, 4, 3, 48, 32).float()
    folder = written(encoder, tmp_path / "export")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "unlabeled_video_vit"
    assert "load_backbone" in model_card.write(folder).read_text()
    with torch.no_grad():
        assert torch.equal(load_backbone(folder)[0](clips).tokens, encoder(clips).tokens)
    with pytest.raises(UserError, match=r"model\.positions is"):
        load_into(body(VIDEOMAE), folder)


def test_options_of_a_clip_come_from_data_and_model():
    model = presets.choose("videomae_micro")[0](frames=8)
    part = Clip().configured(Data(fps=7.5), model)
    assert (part.frames, part.fps) == (8, 7.5)
    with pytest.raises(ConfigError, match=r"model.in_channels = 4: frames of videos have 1 or 3 channels"):
        Clip().configured(Data(), presets.choose("videomae_micro")[0](in_channels=4))


def test_kept_tokens_and_lists_of_clips():
    """A dropped token changes the others only by its absence: a model without blocks gives the same tokens."""
    clips = normal(2, 4, 3, 32, 32).float()
    keep = torch.tensor([[3, 8, 30], [0, 17, 31]])
    for cfg in (VIDEOMAE, VJEPA2):
        encoder = body(cfg)
        with torch.no_grad():
            one, other = encoder([clips, clips[:1]], keep=[keep, None])
            torch.testing.assert_close(one.tokens, encoder(clips, keep=keep).tokens)
            torch.testing.assert_close(other.tokens, encoder(clips[:1]).tokens)
            assert not torch.allclose(one.tokens[0, 0], encoder(clips).tokens[0, 3], atol=1e-3)
            encoder.blocks = encoder.blocks[:0]
            encoder.norm = torch.nn.Identity()
            embedded, _, _ = encoder._embed(clips, None)
            kept, _, _ = encoder._embed(clips, keep)
            torch.testing.assert_close(kept[1], embedded[1, keep[1]])


def test_sizes_that_do_not_fit():
    clips = normal(1, 4, 3, 48, 32).float()
    with pytest.raises(ValueError, match=r"sequence is for clips of 4 frames of 32 pixels, not for a grid of 2×6×4"):
        body(VIDEOMAE)(clips)
    assert body(VJEPA2)(clips).grid == (2, 6, 4)
    with pytest.raises(ValueError, match="a clip of 3 frames of 32×32 pixels does not divide"):
        body(VJEPA2)(clips[:, :3, :, :32])
    with pytest.raises(
        ValueError, match=r"model.frames = 5 must be a multiple of model.tubelet = 2; write model.frames="
    ):
        body(VJEPA2.replace(frames=5))
    with pytest.raises(ValueError, match="a head width that is even and 6 or more, not 4"):
        body(VJEPA2.replace(heads=12))
    with pytest.raises(ValueError, match="takes no mask"):
        body(VJEPA2)(clips, mask=torch.zeros(1, 48, dtype=torch.bool))


def test_positions_of_clips():
    table = clip_table(20, (2, 3, 4)).view(2, 3, 4, 20)
    for t, y, x in ((0, 0, 0), (1, 2, 3), (1, 0, 2)):
        expected = []
        for position in (t, y, x):  # of width 8: four sines, then four cosines
            expected += [math.sin(position / 10000 ** (k / 4)) for k in range(4)]
            expected += [math.cos(position / 10000 ** (k / 4)) for k in range(4)]
        torch.testing.assert_close(table[t, y, x], torch.tensor(expected[:20]))


def test_cubes_and_back():
    clips = normal(2, 4, 3, 16, 24)
    cubes = tubelets(clips, 2, 8)
    assert cubes.shape == (2, 2 * 2 * 3, 2 * 8 * 8 * 3)
    for n, (t, y, x) in ((0, (0, 0, 0)), (4, (0, 1, 1)), (11, (1, 1, 2))):
        cube = clips[:, 2 * t : 2 * t + 2, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        torch.testing.assert_close(cubes[:, n], cube.permute(0, 1, 3, 4, 2).flatten(1))
    torch.testing.assert_close(untubelets(cubes, 2, 8, (2, 2, 3)), clips)


# ---------------------------------------------------------------- VideoMAE
def made_videomae(positions: str = "sequence", **options: Any) -> videomae.VideoMAE:
    torch.manual_seed(0)
    cfg = videomae.Config(decoder_dim=16, decoder_depth=2, decoder_heads=2, **options)
    encoder = VIDEOMAE.replace(positions=positions)
    model: Any = noise(videomae.VideoMAE(cfg, lambda **changes: build_model(encoder, **changes)), 3)
    return model


KEEP = torch.tensor([[3, 9, 19, 25], [0, 14, 16, 30]])


def test_the_initial_weights_of_videomae_are_those_of_xavier():
    """Its decoder is narrow: with a std of 0.02, it predicted little more than zeros after 150 steps."""
    torch.manual_seed(0)
    cfg = videomae.Config(decoder_dim=48, decoder_depth=2, decoder_heads=2)
    model: Any = videomae.VideoMAE(cfg, lambda **changes: build_model(VIDEOMAE, **changes))
    for layer in (model.predict, model.embed, model.blocks[0].mlp.fc1, model.backbone.blocks[0].attn.qkv):
        assert layer.weight.std().item() == pytest.approx((2 / sum(layer.weight.shape)) ** 0.5, rel=0.1)


def naive_videomae(model: Any, clips: Tensor, keep: Tensor) -> Tensor:
    """2203.12602, §3, clip by clip, cube by cube and channel by channel."""
    terms = []
    for clip, kept in zip(clips, keep, strict=True):
        places = [
            [n / 10000 ** (2 * (j // 2) / 16) for j in range(16)] for n in range(TOKENS)
        ]  # the angles of the decoder's positions
        table = torch.tensor([[math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(row)] for row in places]).to(
            clip.dtype
        )  # the tables are fp32
        if model.backbone.cfg.positions != "sequence":
            table = clip_table(16, GRID).to(clip.dtype)
        seen = model.backbone(clip[None], keep=kept[None]).tokens[0]
        masked = [n for n in range(TOKENS) if n not in kept.tolist()]
        rows = [model.embed.weight @ row + table[n] for row, n in zip(seen, kept.tolist(), strict=True)]
        x = torch.stack([*rows, *(model.mask_token[0, 0] + table[n] for n in masked)])
        for block in model.blocks:
            x = block(x, [(1, len(x))])
        for row, n in zip(x[len(kept) :], masked, strict=True):
            t, y, place = n // 16, n % 16 // 4, n % 4
            cube = clip[2 * t : 2 * t + 2, :, 8 * y : 8 * y + 8, 8 * place : 8 * place + 8]  # [2, C, 8, 8]
            prediction = model.predict(model.norm(row)).view(2, 8, 8, 3)
            for c in range(3):
                target = cube[:, c]
                if model.cfg.norm_pix:
                    target = (target - target.mean()) / (target.var(correction=1).sqrt() + 1e-6)
                terms.append((prediction[..., c] - target).square().mean())
    return torch.stack(terms).mean()


def same_gradients(model: Any, one: Tensor, other: Tensor, rtol: float = 1e-8, atol: float = 1e-12) -> None:
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
    found = [torch.autograd.grad(loss, list(named.values())) for loss in (one, other)]
    for name, ours, theirs in zip(named, *found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
        assert ours.abs().sum() > 0, name


@pytest.mark.parametrize(("norm_pix", "positions"), [(True, "sequence"), (False, "sequence"), (True, "sincos")])
def test_videomae_loss(norm_pix: bool, positions: str):
    model: Any = made_videomae(positions, norm_pix=norm_pix).double()
    clips = normal(2, 4, 3, 32, 32)
    loss, _ = model({"clip": clips.unsqueeze(1), "keep": KEEP.unsqueeze(1)}, 0)
    same_gradients(model, loss, naive_videomae(model, clips, KEEP))


def test_videomae_equals_transformers(tmp_path: Path):
    """Loss and gradients of the pixels of the encoder's weights; transformers un-normalises the pixels before."""
    model: Any = made_videomae()
    written(model.backbone, tmp_path / "export")
    cfg = hf.VideoMAEConfig.from_pretrained(tmp_path / "export")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    cfg.update({f"decoder_{key}": value for key, value in sizes.items()})
    theirs: Any = hf.VideoMAEForPreTraining(cfg).eval()
    theirs.videomae.load_state_dict(hf.VideoMAEModel.from_pretrained(tmp_path / "export").state_dict())
    theirs.decoder.norm.eps = 1e-6
    state = {"encoder_to_decoder.weight": model.embed.weight, "mask_token": model.mask_token}
    state |= {f"decoder.norm.{end}": getattr(model.norm, end) for end in ("weight", "bias")}
    state |= {f"decoder.head.{end}": getattr(model.predict, end) for end in ("weight", "bias")}
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for i, block in enumerate(model.blocks):
        for ours, name in names.items():
            for end in ("weight", "bias"):
                state[f"decoder.decoder_layers.{i}.{name}.{end}"] = block.get_parameter(f"{ours}.{end}")
        attention = f"decoder.decoder_layers.{i}.attention.attention"
        for name, part in zip(("query", "key", "value"), block.attn.qkv.weight.chunk(3), strict=True):
            state[f"{attention}.{name}.weight"] = part
        for name, part in zip(("query", "value"), block.attn.qkv.bias.chunk(2), strict=True):
            state[f"{attention}.{name}.bias"] = part
    missing, unexpected = theirs.load_state_dict({k: v.detach() for k, v in state.items()}, strict=False)
    assert not unexpected and all(name.startswith("videomae.") for name in missing)
    clips = normal(2, 4, 3, 32, 32).float()
    masked = torch.ones(2, TOKENS, dtype=torch.bool).scatter(1, KEEP, False)
    loss, _ = model({"clip": clips.unsqueeze(1), "keep": KEEP.unsqueeze(1)}, 0)
    found = theirs(clips, bool_masked_pos=masked).loss
    torch.testing.assert_close(loss, found, rtol=1e-5, atol=1e-6)
    loss.backward(), found.backward()
    kernel = theirs.videomae.embeddings.patch_embeddings.projection.weight.grad  # [D, C, 2, 8, 8]
    ours = model.backbone.patch_embed.weight.grad
    torch.testing.assert_close(ours, kernel.permute(0, 2, 3, 4, 1).flatten(1), rtol=1e-3, atol=1e-6)


def test_videomae_masks_tubes(tmp_path: Path):
    about = About(image_size=32, patch_size=4, channels=3, frames=4, tubelet=2)
    part = videomae.VideoMAE.parts["clip"]
    part = type(part)(frames=4)
    view = videomae.VideoMAE.views(videomae.Config(clips_per_video=3), about)
    sample = part.stand_in("clip", np.random.default_rng(0), about)
    made = view(sample, generators((5, 0)))
    assert made["clip"].shape == (3, 4, 3, 32, 32) and made["keep"].shape == (3, 2 * 7)  # 64 − int(57.6) places
    first, second = made["keep"].reshape(3, 2, 7).transpose(1, 0, 2)
    np.testing.assert_array_equal(second, first + 64)
    assert len({tuple(row) for row in first}) == 3
    counts = np.zeros(64)
    for n in range(300):
        np.add.at(counts, view(sample, generators((n, 1)))["keep"][:, :7].reshape(-1), 1)
    assert abs(counts / counts.mean() - 1).max() < 0.45  # uniform; the deviation of a count is 10 %


def test_videomae_pictures():
    """Of exact predictions, the third column is the clip itself."""
    model: Any = made_videomae()
    clips, keep = normal(1, 4, 3, 32, 32).float(), KEEP[:1]
    exact = videomae.pick(model.target(clips), videomae.complement(keep, TOKENS))
    model.reconstruct = lambda *_: (exact, videomae.complement(keep, TOKENS))
    picture = model.pictures({"clip": clips.unsqueeze(1), "keep": keep.unsqueeze(1)})["reconstructions"]
    assert picture.shape == (3, 4 * 32, 3 * 32)
    true, seen, painted = picture.view(3, 128, 3, 32).unbind(2)
    assert (true.int() - painted.int()).abs().max() <= 1 and (true != seen).float().mean() > 0.7


# ---------------------------------------------------------------- V-JEPA 2
def made_vjepa2(**options: Any) -> vjepa2.VJEPA2:
    torch.manual_seed(0)
    sizes = {"predictor_dim": 24, "predictor_depth": 2, "predictor_heads": 2}
    cfg = vjepa2.Config(**sizes, momentum=Schedule(0.9), **options)
    model = noise(vjepa2.VJEPA2(cfg, lambda **changes: build_model(VJEPA2, **changes)), 3)
    return noise(model, 4).eval()  # type: ignore[return-value]


def test_the_initial_weights_of_vjepa2_have_the_std_of_its_model():
    model: Any = vjepa2.VJEPA2(
        vjepa2.Config(predictor_dim=48, predictor_depth=1, predictor_heads=2),
        lambda **changes: build_model(VJEPA2.replace(initial_std=0.07), **changes),
    )
    encoder, predictor = model.backbone.blocks[0], model.blocks[0]
    for layer in (model.embed, model.predict, encoder.attn.qkv, encoder.mlp.fc1, predictor.attn.qkv, predictor.mlp.fc1):
        assert layer.weight.std().item() == pytest.approx(0.07, rel=0.1)


MASKS: dict[str, Tensor] = {
    "context_0": torch.tensor([[0, 3, 16, 19], [5, 6, 21, 22]]),
    "targets_0": torch.tensor([[1, 2, 4, 17, 18, 20], [0, 1, 2, 16, 17, 18]]),
    "context_1": torch.tensor([[15, 31], [2, 18]]),
    "targets_1": torch.tensor([[0, 1, 2, 3, 16, 17, 18, 19], [8, 9, 10, 11, 24, 25, 26, 27]]),
    "distance_0": torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]]),
    "distance_1": torch.tensor([[3.0, 3.0], [math.sqrt(5), math.sqrt(5)]]),
}


def naive_rotation(x: Tensor, token: int) -> Tensor:
    """A head x [d] rotated as in V-JEPA 2: a third of the features, rounded down to an even number, for each axis."""
    d = len(x)
    width, out = 2 * (d // 3 // 2), x.clone()
    for axis, position in enumerate((token // 16, token % 16 // 4, token % 4)):
        for j in range(width):
            angle = position / 10000 ** ((j % (width // 2)) / (width / 2))
            here = axis * width + j
            partner = -x[here + 1] if j % 2 == 0 else x[here - 1]
            cos, sin = (float(np.float32(f(angle))) for f in (math.cos, math.sin))  # the tables are fp32
            out[here] = x[here] * cos + partner * sin
    return out


def naive_block(block: Any, x: list[Tensor], tokens: list[int]) -> list[Tensor]:
    """A transformer block with rotary positions, token by token and head by head."""
    heads, qkv = block.attn.heads, [block.attn.qkv(block.norm1(row)).view(3, block.attn.heads, -1) for row in x]
    out = []
    for n, row in enumerate(x):
        parts = []
        for head in range(heads):
            query = naive_rotation(qkv[n][0, head], tokens[n])
            keys = [naive_rotation(each[1, head], token) for each, token in zip(qkv, tokens, strict=True)]
            weights = torch.stack([query @ key for key in keys]).div(math.sqrt(len(query))).softmax(0)
            parts.append(sum(w * each[2, head] for w, each in zip(weights, qkv, strict=True)))
        row = row + block.attn.proj(torch.cat(parts))
        out.append(row + block.mlp(block.norm2(row)))
    return out


def naive_vjepa2(model: Any, clips: Tensor, weight: float) -> Tensor:
    """2404.08471, eq. 1, with the predictor's tokens one by one; 2603.14482 for the context."""
    losses = []
    for n in range(2):
        target_terms, context_terms = [], []
        rows = zip(clips, *(MASKS[f"{name}_{n}"] for name in ("context", "targets", "distance")), strict=True)
        for clip, context, targets, distance in rows:
            with torch.no_grad():
                y = [
                    (row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt()
                    for row in model.target(clip[None]).tokens[0]
                ]
            seen = model.backbone(clip[None], keep=context[None]).tokens[0]
            x = [model.embed(row) for row in seen] + [model.mask_tokens[n]] * len(targets)
            tokens = [*context.tolist(), *targets.tolist()]
            for block in model.blocks:
                x = naive_block(block, x, tokens)
            x = [model.norm(row) for row in x]
            for row, k in zip(x[len(context) :], targets, strict=True):
                target_terms.append((model.predict(row) - y[k]).abs().mean())
            if weight:
                for row, k, away in zip(x, context, distance, strict=False):
                    context_terms.append((model.predict_context(row) - y[k]).abs().mean() / away.double().sqrt())
        loss = torch.stack(target_terms).mean()
        losses.append(loss + weight * torch.stack(context_terms).mean() if weight else loss)
    return (losses[0] + losses[1]) / 2


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
def test_vjepa2_loss(dense: bool):
    model: Any = made_vjepa2(context_loss=dense, **({"context_weight": Schedule(0.3)} if dense else {})).double()
    clips = normal(2, 4, 3, 32, 32)
    masks = {name: mask.double() if mask.is_floating_point() else mask for name, mask in MASKS.items()}
    loss, _ = model({"clip": clips, **masks}, 0)
    same_gradients(model, loss, naive_vjepa2(model, clips, 0.3 if dense else 0.0))


def test_vjepa2_predictor_equals_transformers(tmp_path: Path):
    model: Any = made_vjepa2()
    folder = written(model.backbone, tmp_path / "export")
    cfg = hf.VJEPA2Config.from_pretrained(folder)
    cfg.update({"pred_hidden_size": 24, "pred_num_hidden_layers": 2, "pred_num_attention_heads": 2})
    cfg.update({"pred_num_mask_tokens": 2})
    theirs: Any = hf.VJEPA2Model(cfg).eval().predictor
    state = {"embeddings.mask_tokens": model.mask_tokens.view(2, 1, 1, 24)}
    for name, part in (
        ("embeddings.predictor_embeddings", model.embed),
        ("layernorm", model.norm),
        ("proj", model.predict),
    ):
        state |= {f"{name}.{end}": getattr(part, end) for end in ("weight", "bias")}
    for i, block in enumerate(model.blocks):
        for ours, name in (("norm1", "norm1"), ("norm2", "norm2"), ("mlp.fc1",) * 2, ("mlp.fc2",) * 2):
            state |= {f"layer.{i}.{name}.{end}": block.get_parameter(f"{ours}.{end}") for end in ("weight", "bias")}
        state |= {f"layer.{i}.attention.proj.{end}": getattr(block.attn.proj, end) for end in ("weight", "bias")}
        for end in ("weight", "bias"):
            parts = getattr(block.attn.qkv, end).chunk(3)
            state |= {
                f"layer.{i}.attention.{name}.{end}": part
                for name, part in zip(("query", "key", "value"), parts, strict=True)
            }
    theirs.load_state_dict({k: v.detach() for k, v in state.items()})
    forward = theirs.embeddings.forward  # its argument `mask_index` is the number of the mask token
    tokens = [normal(2, MASKS[f"context_{n}"].shape[1], 48, seed=n).float() for n in range(2)]
    with torch.no_grad():
        features = [vjepa2.Features(x.mean(1), x, x[:, :0], GRID) for x in tokens]
        contexts, targets = ([MASKS[f"{name}_{n}"] for n in range(2)] for name in ("context", "targets"))
        ours = model.predicted(features, contexts, targets)
        for n in range(2):
            everywhere = torch.zeros(2, TOKENS, 48)  # it picks the context from the tokens of the whole clip
            everywhere.scatter_(1, contexts[n].unsqueeze(-1).expand(-1, -1, 48), tokens[n])
            theirs.embeddings.forward = functools.partial(forward, mask_index=n)
            found = theirs(everywhere, [contexts[n]], [targets[n]]).last_hidden_state
            prediction = model.predict(ours[n][:, contexts[n].shape[1] :])
            torch.testing.assert_close(prediction, found, rtol=1e-4, atol=1e-5)


def test_vjepa2_exports_its_target_and_updates_it():
    model: Any = made_vjepa2()
    assert model.exports()["model"].backbone is model.target
    before = {k: v.clone() for k, v in model.target.state_dict().items()}
    model.after_step(3)
    for key, value in model.target.state_dict().items():
        torch.testing.assert_close(value, 0.9 * before[key] + 0.1 * model.backbone.state_dict()[key])


@pytest.mark.parametrize("count, scale", [(8, 0.15), (2, 0.7)])
def test_blocks_over_time(count: int, scale: float):
    """Context and targets are apart, and the same at all times; the targets are blocks: most neighbours of one are
    targets. The distances are those of the nearest target."""
    masks = BlocksOverTime((3, 14, 14), count, (scale, scale), (0.75, 1.5))
    expected = 1 - (1 - scale) ** count  # of places that blocks cover, if they could leave the frame
    assert 0.5 * expected < masks.target_places / 196 < 1 and masks.context_places >= 4
    shares = []
    for n in range(40):
        context, targets, distance = masks({"seed": 1, "step": n // 8}, np.random.default_rng(n))
        places, target_places = context.reshape(3, -1), targets.reshape(3, -1)
        assert places.shape[1] == masks.context_places and target_places.shape[1] == masks.target_places
        for index in (places, target_places):
            assert (np.diff(index[0]) > 0).all() and index.max() < 3 * 196
            np.testing.assert_array_equal(index - index[0], 196 * np.arange(3)[:, None] + 0 * index)
        assert not set(context) & set(targets)
        grid = np.zeros((16, 16), bool)  # with a border around the 14 × 14 places
        inner = np.zeros(196, bool)
        inner[target_places[0]] = True
        grid[1:15, 1:15] = inner.reshape(14, 14)
        neighbours = sum(np.roll(grid, shift, axis)[grid].mean() for shift in (1, -1) for axis in (0, 1)) / 4
        shares.append(neighbours)
        rows, columns = np.divmod(target_places[0], 14)
        for k in range(0, places.shape[1], 3):
            y, x = divmod(int(places[0, k]), 14)
            assert distance[k] == pytest.approx(np.hypot(rows - y, columns - x).min(), rel=1e-5)
    assert np.mean(shares) > 0.6  # of places drawn one by one: about a half
    again = masks({"seed": 1, "step": 4}, np.random.default_rng(39))
    assert all(np.array_equal(a, b) for a, b in zip(again, (context, targets, distance), strict=True))
