"""Backbones compared with transformers and timm with noised weights, in both directions, and every option that only
training uses compared with plain formulas. Weights are loaded from folders and files of transformers, timm and the
official layouts; if they do not fit, one error names all problems."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.errors import UserError
from pretrain.build import build_objective
from pretrain.checkpoint.integrity import run_json_digest
from pretrain.checkpoint.tools import locate
from pretrain.interchange import export, weight_sources, weights
from pretrain.interchange.layouts import official, timm
from pretrain.interchange.load_record import record_loading, report_loaded, skip_loading
from pretrain.interchange.weight_sources import find_source
from pretrain.models import families, presets
from pretrain.models.build import build_model
from pretrain.models.convnext import ConvBlock, ConvolutionalNetwork
from pretrain.models.layers import Attention, QueryKeyValue
from pretrain.models.positions import rope_angles, rope_change, rope_periods
from tests.conftest import run_of, teacher_run, tiny_recipe
from tests.parity.test_models import (
    ABOUT,
    MEAN,
    SIZES,
    STD,
    assert_close,
    assert_round_trip,
    assert_same_features,
    images,
    noise,
    open_with_transformers,
    vit,
)

DINOV3 = {
    "positions": "rope",
    "registers": 4,
    "layer_scale": 1e-5,
    "norm_eps": 1e-5,
    "key_bias": False,
    "mask_token": True,
}


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    return transformers


def convnext(**options: object) -> ConvolutionalNetwork:
    cfg = families.ConvNeXt(**({"image_size": 64, "widths": [8, 16, 24, 32], "depths": [1, 2, 3, 1]} | options))
    cfg.name = "convnext"
    model = ConvolutionalNetwork(cfg).eval()
    noise(model)
    return model


# ---------------------------------------------------------------- out, and back
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@torch.no_grad()
def test_dinov3_to_transformers(hf, tmp_path: Path, mlp: str):
    """Without biases of keys, with a norm for local crops that is not exported, and with options that have an effect
    only in training."""
    model = vit(**DINOV3, mlp=mlp, local_cls_norm=True, rope_rescale=2.0, rope_jitter=1.1, rope_shift=0.1)
    export.write(tmp_path / "out", model, ABOUT, MEAN, STD)
    theirs = open_with_transformers(hf, tmp_path / "out")
    assert theirs.config.key_bias is False and theirs.config.pos_embed_rescale == 2.0
    for height, width in SIZES:
        x = images(height, width)
        mask = torch.rand(2, height * width // 64, generator=torch.Generator().manual_seed(1)) < 0.4
        assert_same_features(model(x), theirs(x).last_hidden_state, 4)
        assert_same_features(model(x, mask=mask), theirs(x, bool_masked_pos=mask).last_hidden_state, 4)
    again, _ = export.load(tmp_path / "out")
    assert again.cfg.local_cls_norm is False and torch.equal(again(images()).tokens, model(images()).tokens)


@torch.no_grad()
def test_bf16_is_close(hf, tmp_path: Path):
    """Under bf16 autocast, patch features differ by at most 0.2 standard deviations from fp32, and by at most 0.3
    from transformers in bf16."""
    model = vit(**DINOV3)
    export.write(tmp_path / "out", model, ABOUT, MEAN, STD)
    theirs, x = open_with_transformers(hf, tmp_path / "out"), images()
    exact = model(x).tokens
    with torch.autocast("cpu", torch.bfloat16):
        ours, others = model(x).tokens.float(), theirs(x).last_hidden_state[:, 5:].float()
    scale = exact.std()
    assert (ours - exact).abs().max() < 0.2 * scale and (ours - others).abs().max() < 0.3 * scale
    model.to(torch.bfloat16)  # the periods are no buffer: they stay in fp32
    assert model._rotation((4, 4), None, torch.device("cpu"))[0][0].dtype == torch.float32


def test_positions_are_of_fp32_in_a_bf16_model():
    """With the published width of a head, whose periods bf16 cannot represent; those of narrow heads, 1 and 10, it
    can."""
    model = vit(**DINOV3, dim=64, heads=1).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        cos, sin = (table[0] for table in model._rotation((4, 6), None, torch.device("cpu")))
    centres = [(torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in (4, 6)]
    periods = torch.tensor([100 ** (2 * k / 32) for k in range(16)], dtype=torch.float64)
    rows, columns = torch.meshgrid(*centres, indexing="ij")
    angles = torch.cat([2 * math.pi * axis.reshape(-1, 1) / periods for axis in (rows, columns)], 1)
    torch.testing.assert_close(cos[5:, 0].double(), angles.cos(), rtol=0, atol=2e-6)
    torch.testing.assert_close(sin[5:, 0].double(), angles.sin(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("layer_scale", [1e-6, None])
@torch.no_grad()
def test_convnext_to_transformers_and_timm(hf, tmp_path: Path, layer_scale: float | None):
    model = convnext(layer_scale=layer_scale)
    export.write(tmp_path / "out", model, ABOUT, MEAN, STD)
    theirs = open_with_transformers(hf, tmp_path / "out")
    assert type(theirs).__name__ == "DINOv3ConvNextModel"
    other = timm_model(model, tmp_path / "timm")
    for height, width in [(64, 64), (96, 128), (64, 80)]:
        x = images(height, width)
        ours = model(x)
        assert ours.grid == (height // 32, width // 32) and ours.registers.shape[1] == 0
        sequence = theirs(x).last_hidden_state
        assert_close(ours.cls, sequence[:, 0])
        assert_close(ours.tokens, sequence[:, 1:])
        assert_close(ours.cls, other(x))
    if layer_scale is not None:
        assert_round_trip(tmp_path / "out", model)


def timm_model(model: nn.Module, folder: Path) -> nn.Module:
    """timm's model with our weights, from the folder that we write."""
    import timm as library

    fields, tensors = timm.write(model.cfg, model.state_dict(), MEAN, STD)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return library.create_model(f"local-dir:{folder}", pretrained=True).eval()


TIMM = [
    {**DINOV3},
    {**DINOV3, "mlp": "swiglu", "mlp_ratio": 2.5},
    {**DINOV3, "qkv_bias": False, "registers": 0, "rope_base": 37.0},
    {**DINOV3, "layer_scale": None},
    {"norm_eps": 1e-6},
    {"layer_scale": 0.5, "registers": 4, "mask_token": True},
    {"mlp": "swiglu", "mlp_ratio": 8 / 3, "layer_scale": 0.5, "positions": "sincos"},
    {"key_bias": False, "layer_scale": 0.5},
    {"in_channels": 5},
]


@pytest.mark.parametrize("options", TIMM, ids=str)
@torch.no_grad()
def test_vit_to_timm_and_back(tmp_path: Path, options: dict):
    model = vit(**options)
    theirs, channels = timm_model(model, tmp_path / "timm"), options.get("in_channels", 3)
    for height, width in (
        [(32, 32), (48, 64)] if "positions" in options and "sincos" not in options.values() else [(32, 32)]
    ):
        x = images(height, width, channels=channels)
        sequence = theirs.forward_features(x)
        assert_same_features(model(x), sequence, options.get("registers", 0))
        assert_close(model(x).cls, theirs(x))
    again, about = weights.load_backbone(tmp_path / "timm")
    assert about["mean"] == MEAN and again.cfg.mask_token is False
    assert_close(again(x).tokens, model(x).tokens)
    assert_close(again(x).cls, model(x).cls)


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_small_patch16_dinov3_qkvb", {}),
        ("vit_small_plus_patch16_dinov3", {}),
        ("vit_giant_patch14_reg4_dinov2", {}),
        ("vit_small_patch14_dinov2", {}),
        ("convnext_tiny", {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}),
        ("convnext_atto", {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}),  # its linears are 1 × 1 convolutions
    ],
)
@torch.no_grad()
def test_from_timm(tmp_path: Path, name: str, options: dict):
    """A random model of timm, with noise, is loaded from its folder into our model."""
    import timm as library

    small = {} if options else {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "img_size": 32}
    theirs = library.create_model(
        name, num_classes=0, global_pool="token" if small else "avg", **small, **options
    ).eval()
    noise(theirs)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": name, "model_args": small | options, "pretrained_cfg": {}})
    )
    ours, about = weights.load_backbone(tmp_path)
    x = images(32, 32) if small else images(64, 64)
    assert_close(ours(x).cls, theirs(x))
    assert about["mean"] == weight_sources.MEAN


@torch.no_grad()
def test_folders_as_timm_writes_them_by_default(tmp_path: Path):
    """config.json and pytorch_model.bin, from which tensors are read without executing anything."""
    import timm as library

    small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "img_size": 32}
    theirs = library.create_model("vit_small_patch16_224", num_classes=10, **small).eval()
    noise(theirs)
    library.models.save_for_hf(theirs, str(tmp_path), model_args=small)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    ours, about = weights.load_backbone(tmp_path)
    assert_close(
        ours(images(32, 32)).cls, theirs.forward_head(theirs.forward_features(images(32, 32)), pre_logits=True)
    )
    assert about["mean"] == [0.5, 0.5, 0.5]

    class Evil:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("executed").write_text, ("x",))

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: cannot be read"):
        weights.load_backbone(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_timm_refuses(tmp_path: Path):
    with pytest.raises(UserError, match="timm's ViT with rotary positions has no bias for keys"):
        timm.write(vit(**{**DINOV3, "key_bias": True}).cfg, {}, MEAN, STD)
    for name, options, message in [
        ("resnet18", {}, "is timm's ResNet"),
        ("vit_base_patch16_clip_quickgelu_224", {}, "its activation is QuickGELU"),
        ("convnext_atto", {"act_layer": "relu"}, "its activation is ReLU; only GELU can be read"),
        ("vit_base_patch16_siglip_224", {}, r"has no class token \(its global_pool is 'map'\)"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, r"has no last norm \(its global_pool is 'avg'\)"),
    ]:
        fields = {"architecture": name, "pretrained_cfg": {}, "model_args": options}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(UserError, match=message):
            find_source(tmp_path)


# ---------------------------------------------------------------- from transformers
@pytest.mark.parametrize(
    "kind",
    [
        "dinov3_vit",
        "dinov3_gated",
        "dinov3_convnext",
        "dinov2",
        "dinov2_registers",
        "dinov2_swiglu",
        "vit",
        "vit_mae",
        "resnet",
    ],
)
@torch.no_grad()
def test_from_transformers(hf, tmp_path: Path, kind: str):
    """A random model, with noise, that transformers has saved is loaded into our model."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
    rotary = sizes | {"intermediate_size": 96, "num_register_tokens": 4}
    maps = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
    theirs = {
        "dinov3_vit": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**rotary)),
        "dinov3_gated": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**rotary, use_gated_mlp=True, hidden_act="silu")),
        "dinov3_convnext": lambda: hf.DINOv3ConvNextModel(hf.DINOv3ConvNextConfig(**maps)),
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**sizes, mlp_ratio=3)),
        "dinov2_registers": lambda: hf.Dinov2WithRegistersModel(
            hf.Dinov2WithRegistersConfig(**sizes, num_register_tokens=3)
        ),
        "dinov2_swiglu": lambda: hf.Dinov2Model(hf.Dinov2Config(**sizes, use_swiglu_ffn=True)),
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**sizes, intermediate_size=96), add_pooling_layer=False),
        "vit_mae": lambda: hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**sizes, intermediate_size=96, mask_ratio=0.0)),
        "resnet": lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[32, 48], depths=[1, 2])),
    }[kind]().eval()
    noise(theirs)
    theirs.save_pretrained(tmp_path)
    ours, _ = weights.load_backbone(tmp_path)
    x = images(64, 64) if kind in ("dinov3_convnext", "resnet") else images(32, 32)
    features = ours(x)
    if kind == "vit_mae":
        sequence = theirs.vit(x, noise=torch.arange(16).expand(2, -1).float()).last_hidden_state
    else:
        sequence = theirs(x).last_hidden_state
    if kind == "resnet":
        assert_close(features.tokens, sequence.flatten(2).transpose(1, 2))
    else:
        assert_same_features(features, sequence, features.registers.shape[1])
    if kind == "dinov3_vit":
        y = images(48, 64)
        assert_same_features(ours(y), theirs(y).last_hidden_state, 4)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
WIDE = SMALL | {"intermediate_size": 96}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViT", WIDE | {"hidden_act": "quick_gelu"}),
        ("Dinov2", SMALL | {"hidden_act": "gelu_pytorch_tanh"}),
        ("DINOv3ViT", WIDE | {"hidden_act": "gelu_pytorch_tanh"}),
        ("CLIPVision", WIDE),
        ("SiglipVision", WIDE | {"hidden_act": "gelu"}),
        ("Wav2Vec2Bert", {**WIDE, "conv_depthwise_kernel_size": 7, "apply_spec_augment": False}),
    ],
)
@torch.no_grad()
def test_folders_with_other_values_than_ours(hf, tmp_path: Path, kind: str, options: dict):
    """Activations; names of tensors without the prefix `vision_model.`, as version 5 writes those of the image models of
    CLIP and SigLIP; a vocab_size that is null, as in w2v-BERT 2.0."""
    theirs = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**options)).eval()
    noise(theirs)
    theirs.save_pretrained(tmp_path)
    ours, _ = weights.load_backbone(tmp_path)
    x = torch.randn(2, 12, 160) if kind == "Wav2Vec2Bert" else images(32, 32)
    found = theirs(x)
    if kind == "CLIPVision":  # whose patches have no norm
        assert_close(ours(x).cls, found.pooler_output)
    else:
        tokens = ours(x).tokens
        assert_close(tokens, found.last_hidden_state[:, -tokens.shape[1] :])


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("ViT", WIDE | {"hidden_act": "relu"}, "hidden_act = 'relu' cannot be read; only gelu, gelu_pytorch_tanh"),
        ("ViTMAE", WIDE | {"hidden_act": "relu"}, "hidden_act = 'relu' cannot be read"),
        ("Dinov2", SMALL | {"hidden_act": "relu"}, "hidden_act = 'relu' cannot be read"),
        ("DINOv3ConvNext", {"hidden_sizes": [8] * 4, "hidden_act": "relu"}, "hidden_act = 'relu' cannot be read"),
        ("VideoMAE", WIDE | {"hidden_act": "relu"}, "hidden_act = 'relu' cannot be read; only 'gelu' can"),
        ("VJEPA2", {"hidden_size": 24, "num_attention_heads": 2, "hidden_act": "relu"}, "'relu' cannot be read"),
        ("ResNet", {"hidden_act": "gelu"}, "hidden_act = 'gelu' cannot be read; only 'relu' can"),
        ("ResNet", {"downsample_in_bottleneck": True}, "downsample_in_bottleneck = True cannot be read"),
        ("ResNet", {"downsample_in_first_stage": True}, "downsample_in_first_stage = True cannot be read"),
        ("Swin", {}, r"num_heads is \[3, .* model_type = 'swin'\); .* take another one"),
    ],
)
def test_models_that_we_do_not_have_are_refused(hf, tmp_path: Path, kind: str, options: dict, says: str):
    """With these values, our model would compute other features from the same weights."""
    getattr(hf, f"{kind}Config")(**options).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=says):
        weights.load_backbone(tmp_path)


def test_shards_of_safetensors(hf, tmp_path: Path):
    theirs = hf.DINOv3ViTModel(
        hf.DINOv3ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    )
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(weights.load_backbone(tmp_path)[0].patch_embed.weight, theirs.embeddings.patch_embeddings.weight)


# ---------------------------------------------------------------- official files
@pytest.mark.parametrize(
    "options",
    [
        DINOV3,
        {**DINOV3, "mlp": "swiglu", "mlp_ratio": 2.5, "qkv_bias": False, "local_cls_norm": True},
        {"layer_scale": 0.5, "mask_token": True},
        {"mlp": "swiglu", "layer_scale": 0.5, "registers": 2, "mask_token": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("wrap", ["bare", "teacher"])
@torch.no_grad()
def test_official_vit(tmp_path: Path, options: dict, wrap: str):
    model = vit(**{**options, "dim": 128, "heads": 2})
    tensors = official.write(model.cfg, model.state_dict())
    if options is DINOV3:
        for i in range(2):  # what a masked bias holds does not matter
            tensors[f"blocks.{i}.attn.qkv.bias"][128:256] = math.nan
    file: dict = tensors
    if wrap == "teacher":
        file = {
            "teacher": {f"backbone.{k.replace('blocks.', 'blocks.0.')}": v for k, v in tensors.items()}
            | {"dino_head.x": torch.ones(1)}
        }
    torch.save(file, tmp_path / "weights.pth")
    again, about = weights.load_backbone(tmp_path / "weights.pth")
    assert about["step"] is None
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(model(images()).tokens, again(images()).tokens)


@torch.no_grad()
def test_official_positions_at_other_sizes(tmp_path: Path):
    """An option of the reader: the offset of the official code, in the model and where a table is resized."""
    model = vit(dim=128, heads=2)
    torch.save(official.write(model.cfg, model.state_dict()), tmp_path / "weights.pth")
    found, _ = weights.load_backbone(tmp_path / "weights.pth", position_offset=0.1)
    assert torch.equal(found(images()).tokens, model(images()).tokens)
    assert not torch.equal(found(images(48, 64)).tokens, model(images(48, 64)).tokens)
    larger = build_model(model.cfg, image_size=48, position_offset=0.1).eval()
    weights.load_into(larger, tmp_path / "weights.pth")
    assert torch.equal(larger(images(48, 48)).tokens, found(images(48, 48)).tokens)


@torch.no_grad()
def test_official_convnext(tmp_path: Path):
    model = convnext()
    tensors = official.write(model.cfg, model.state_dict())
    assert torch.equal(tensors["norms.3.weight"], tensors["norm.weight"])
    save_file(tensors, tmp_path / "weights.safetensors")
    again, _ = weights.load_backbone(tmp_path / "weights.safetensors")
    assert torch.equal(model(images(64, 64)).tokens, again(images(64, 64)).tokens)


@pytest.mark.parametrize(
    "name, keys, millions",
    [
        ("dinov3_vits16", 188, 21.60),
        ("dinov3_vits16plus", 212, 28.70),
        ("dinov3_vitb16", 188, 85.67),
        ("dinov3_vitl16", 368, 303.15),
        ("dinov3_vitl16plus", 416, 403.92),
        ("dinov3_vith16plus", 552, 840.63),
        ("dinov3_vit7b16", 610, 6716.04),
        ("convnext_tiny", 182, 27.82),
        ("convnext_small", 344, 49.45),
        ("convnext_base", 344, 87.57),
        ("convnext_large", 344, 196.23),
    ],
)
def test_named_sizes(name: str, keys: int, millions: float):
    """Names and numbers of parameters of the released files; these also count biases of keys, which are always zero
    and which our models do not have."""
    cls, options = presets.choose(name)
    cfg = cls(**options)
    cfg.name = name
    with torch.device("meta"):
        model = build_model(cfg, **({"mask_token": True} if cls is families.ViT else {}))
    assert len(official.write(cfg, model.state_dict())) == keys
    total = sum(p.numel() for p in model.parameters()) + (
        cfg.depth * cfg.dim if cls is families.ViT and cfg.qkv_bias else 0
    )
    assert total / 1e6 == pytest.approx(millions, abs=0.011)


# ---------------------------------------------------------------- into a model that a recipe built
def test_what_may_differ(tmp_path: Path):
    """A new mask token, a norm for local crops that starts as the common norm, another size of the position table,
    biases of keys."""
    source = vit(registers=2, layer_scale=None, key_bias=False)
    export.write(tmp_path / "out", source, ABOUT, MEAN, STD)
    options = {
        "registers": 2,
        "layer_scale": 1e-5,
        "mask_token": True,
        "local_cls_norm": True,
        "image_size": 64,
        "key_bias": True,
    }
    model = vit(**options)
    weights.load_into(model, tmp_path / "out")
    assert torch.equal(model.local_cls_norm.weight, source.norm.weight) and model.pos_embed.shape == (1, 65, 32)
    with torch.no_grad():
        x = images(64, 64)
        assert_close(model.eval()(x).tokens, source(x).tokens)
    with skip_loading():
        weights.load_into(vit(dim=64), tmp_path / "nothing")


def test_a_checkpoint_by_its_step(shards: Path):
    """Leading zeros of a step may be omitted; other paths give an error that says that they are no checkpoint."""
    folder = teacher_run(shards) / "checkpoints"
    one, other = (weights.load_backbone(folder / name)[0].state_dict() for name in ("2", "000000002"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert locate(f"{folder}/2")[1] == "000000002"
    for where, message in (
        (folder / "7", "is not a checkpoint; the steps in .* are: 2"),
        (folder.parent / "export" / "2", "is an export, which holds a backbone alone; name its run"),
        (folder.parent / "export", "holds no checkpoint; name a folder"),
    ):
        with pytest.raises(UserError, match=message):
            locate(str(where))
    with pytest.raises(UserError, match=r"the steps in .* are: 2"):
        find_source(folder / "7")


@pytest.mark.parametrize("name", ["mae", "dinov2", "distillation"])
def test_the_encoder_of_a_checkpoint_is_what_is_exported(name: str, shards: Path):
    """Also the average of a student, and also for a checkpoint of an earlier version, which does not name its
    encoder."""
    run = run_of(name, shards)
    expected = weights.load_backbone(run / "export" / "2")[0].state_dict()
    path = run / "checkpoints" / "000000002" / "run.json"
    whole = path.read_text()
    about = json.loads(whole)
    del about["digest"], about["encoder"]
    for text in (whole, json.dumps({**about, "digest": run_json_digest(about)})):
        path.write_text(text)
        found = weights.load_backbone(path.parent)[0].state_dict()
        assert expected.keys() - found.keys() <= {"mask_token"}  # which the objective asks for, not the recipe's model
        assert all(torch.equal(expected[key], value) for key, value in found.items())
    path.write_text(whole)


@pytest.mark.parametrize(
    "name", ["facebook/dinov2-base", "hf-hub:facebook/dinov2-base", "https://huggingface.co/facebook/dinov2-base"]
)
def test_a_name_of_a_hub_is_answered_with_how_to_download(name: str):
    says = r"^facebook/dinov2-base: there is no such file .* run `hf download facebook/dinov2-base --local-dir dinov2-base`, and write dinov2-base"
    with pytest.raises(UserError, match=says):
        find_source(name)


def test_where_pixels_were_normalised_otherwise_it_is_said(tmp_path: Path):
    export.write(tmp_path / "out", vit(), ABOUT, [0.5, 0.5, 0.5], [0.229, 0.224, 0.225])
    with record_loading() as taken:
        weights.load_into(vit(), tmp_path / "out")
        weights.load_into(vit(), tmp_path / "out")  # a second network of the same source is no news
    came, differs = report_loaded(taken, weight_sources.MEAN, weight_sources.STD)
    assert came == f"weights from {tmp_path}/out (unlabeled, step 3): the backbone vit, 30 tensors, 0.03 M numbers", (
        came
    )
    assert "trained on pixels with mean [0.5,0.5,0.5] and std [0.229,0.224,0.225]" in differs
    assert differs.endswith("write data.mean=[0.5,0.5,0.5]")
    assert report_loaded(taken, [0.5, 0.5, 0.5], weight_sources.STD) == [came]
    weights.load_into(vit(), tmp_path / "out")
    assert len(taken) == 2


def test_of_a_teacher_it_is_said_too(shards: Path, tmp_path: Path):
    export.write(tmp_path / "gram", vit(heads=2), ABOUT, [0.5] * 3, [0.25] * 3)
    for name, options in (
        ("distillation", [f"objective.teacher={tmp_path / 'gram'}"]),
        ("dinov3", ["model.positions=learned", f"objective.gram_teacher={tmp_path / 'gram'}"]),
    ):
        cfg = tiny_recipe(name, shards, tmp_path / "run", *options)
        with record_loading() as taken:
            build_objective(cfg, start=True)
        _, differs = report_loaded(taken, cfg.data.mean, cfg.data.std)
        assert differs.endswith("write data.mean=[0.5,0.5,0.5] data.std=[0.25,0.25,0.25]"), name


def test_what_does_not_fit_is_named(tmp_path: Path):
    export.write(tmp_path / "out", vit(mask_token=True), ABOUT, MEAN, STD)
    cases = [
        (
            {"heads": 2, "norm_eps": 1e-3},
            r"model.heads is 2 here and 4 there, model.norm_eps is 0.001 here and 1e-06 there",
        ),
        ({"depth": 3}, r"is another model: model.depth is 3 here and 2 there; write model.depth=2$"),
        (
            {"dim": 64, "registers": 4},
            r"model.dim is 64 here and 32 there, model.registers is 4 here and 0 there.*; write model.dim=32 model.registers=0$",
        ),
        (
            {"in_channels": 5, "mlp_ratio": 2.0},
            r"model.mlp_ratio is 2.0 here and 4.0 there, model.in_channels is 5 here and 3 there",
        ),
        ({"qkv_bias": False}, r"model.qkv_bias is False here and True there; write model.qkv_bias=true$"),
        ({"positions": "rope"}, r"model.positions is 'rope' here and 'learned' there"),
        ({"key_bias": False}, r"the keys have biases, but model.key_bias is false"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            weights.load_into(vit(**options), tmp_path / "out")
    export.write(tmp_path / "scaled", vit(layer_scale=0.5), ABOUT, MEAN, STD)
    with pytest.raises(
        UserError, match=r"model.layer_scale is None here and 0.5 there.*; write model.layer_scale=0.5$"
    ):
        weights.load_into(vit(), tmp_path / "scaled")
    export.write(tmp_path / "rope", vit(**DINOV3), ABOUT, MEAN, STD)
    with pytest.raises(UserError, match=r"model.rope_base is 10.0 here and 100.0 there; write"):
        weights.load_into(vit(**DINOV3, rope_base=10.0), tmp_path / "rope")
    with pytest.raises(UserError, match=r"holds a ViT, but model\.name = convnext is a ConvNeXt; write model=vit"):
        weights.load_into(convnext(), tmp_path / "out")
    save_file({"a.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"does not have the tensor names of a DINOv2 or DINOv3 file \(a.weight"):
        find_source(tmp_path / "other.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad.pth: cannot be read"):
        find_source(tmp_path / "bad.pth")


# ---------------------------------------------------------------- options of training
def test_initial_values():
    """Linear layers and tokens are normal with std 0.02 (linear layers truncated at two sigma), kernels uniform
    below 1/√fan-in, biases and the mask token zero."""
    cfg = families.ViT(image_size=64, patch_size=8, dim=128, depth=2, heads=4, **{**DINOV3, "registers": 16})
    cfg.name = "vit"
    torch.manual_seed(0)
    found = build_model(cfg).state_dict()
    for name, value in found.items():
        if name.endswith("bias") or name == "mask_token":
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif name.endswith("gamma"):
            assert (value == 1e-5).all(), name
        elif name == "patch_embed.weight":
            bound = (3 * 64) ** -0.5
            assert 0.98 * bound < value.abs().max() <= bound
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.25), name
    learned = build_model(cfg.replace(positions="learned", key_bias=True)).state_dict()["pos_embed"]
    assert learned.std().item() == pytest.approx(0.02, rel=0.05)


def test_keys_have_no_bias():
    torch.manual_seed(0)
    plain, ours = nn.Linear(8, 24).double(), QueryKeyValue(8).double()
    with torch.no_grad():
        plain.bias[8:16] = 0
        ours.weight.copy_(plain.weight)
        ours.bias.copy_(plain.bias[[*range(8), *range(16, 24)]])
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-14)
    assert isinstance(Attention(8, 2, qkv_bias=True, key_bias=False).qkv, QueryKeyValue) and ours.bias.shape == (16,)
    assert Attention(8, 2, qkv_bias=False, key_bias=False).qkv.bias is None


def test_rope_change():
    """Angles of changed coordinates, in the order shift, jitter, rescale, computed in loops."""
    torch.manual_seed(3)
    change = rope_change(200, 0.2, 1.5, 2.0)
    scale, shift = change[:, 0], change[:, 1]
    assert shift.abs().max() <= 0.2 and shift.std() == pytest.approx(0.2 / math.sqrt(3), rel=0.1)
    ratio = (scale[:, 0] / scale[:, 1]).log()  # the rescaling falls out
    assert ratio.abs().max() <= 2 * math.log(1.5) and ratio.std() == pytest.approx(
        math.log(1.5) * math.sqrt(2 / 3), rel=0.15
    )
    assert scale.log().abs().max() <= math.log(3) and scale.log().abs().max() > math.log(2)
    torch.manual_seed(3)
    only = rope_change(200, None, None, 2.0)
    assert not only[:, 1].any() and torch.equal(only[:, 0, 0], only[:, 0, 1])
    torch.testing.assert_close(only[:, 0, 0].log().std().item(), math.log(2) / math.sqrt(3), rtol=0.1, atol=0)
    torch.testing.assert_close((scale / only[:, 0]).log().std().item(), math.log(1.5) / math.sqrt(3), rtol=0.1, atol=0)
    periods = rope_periods(8, 100.0)
    angles = rope_angles(periods, (2, 3), change)
    for b, patch, j in [(0, 0, 0), (1, 4, 1), (7, 5, 2), (9, 3, 3)]:
        axis = j // 2
        place, count = (divmod(patch, 3)[axis], (2, 3)[axis])
        coordinate = ((2 * (place + 0.5) / count - 1) + shift[b, axis]) * scale[b, axis]
        assert angles[b, patch, j].item() == pytest.approx((2 * math.pi * coordinate / periods[j % 2]).item(), rel=1e-5)
        assert angles[b, patch, j + 4] == angles[b, patch, j]
    torch.testing.assert_close(
        rope_angles(periods, (2, 3), rope_change(1, None, None, None))[0], rope_angles(periods, (2, 3))
    )


def test_rope_is_changed_in_training_alone():
    """Each block and each size draws a change; the same seed gives the same changes; class token and registers are
    not rotated."""
    model, x = vit(**DINOV3, rope_rescale=2.0, rope_shift=0.1), [images(), images(16, 16)]
    still = vit(**DINOV3)
    assert torch.equal(model(x)[0].tokens, still(x)[0].tokens)
    model.train()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(model(x)[0].tokens.detach())
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2], atol=1e-3)
    cos = model._rotation((4, 4), None, torch.device("cpu"))[0]
    assert len(cos) == 2 and not torch.equal(cos[0], cos[1]) and bool((cos[0, :5] == 1).all())
    keep = torch.tensor([[3, 1], [0, 2]])
    torch.manual_seed(0)
    whole = model._rotation((4, 4), None, torch.device("cpu"))[0][1]
    torch.manual_seed(0)
    part = model._rotation((4, 4), keep, torch.device("cpu"))[0][1]
    assert part.shape == (2, 7, 1, 4) and torch.equal(part[1, 5:], whole[[5, 7]])


def test_local_crops_have_a_norm_of_their_own():
    model, plain = vit(**DINOV3, local_cls_norm=True), vit(**DINOV3)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("local_cls")})
    x = [images(), images(16, 16, 3), images(16, 32, 2)]
    assert all(torch.equal(a.cls, b.cls) for a, b in zip(model(x), plain(x), strict=True))
    model.train(), plain.train()
    ours, common = model(x), plain(x)
    assert torch.equal(ours[0].cls, common[0].cls) and torch.equal(ours[1].tokens, common[1].tokens)
    norm, own = plain.norm, model.local_cls_norm
    for a, b in zip(ours[1:], common[1:], strict=True):
        assert a.grid == b.grid
        for value, other in ((a.cls, b.cls), (a.registers, b.registers)):
            before = (other - norm.bias) / norm.weight  # normalised, not yet scaled
            torch.testing.assert_close(value, before * own.weight + own.bias, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(value, other, atol=1e-2)
    pair = model(x[:2])  # one size of local crops, as all recipes have
    assert torch.equal(pair[0].cls, common[0].cls) and torch.allclose(pair[1].cls, ours[1].cls, atol=1e-5)
    two = model(x, layers=2)
    assert torch.equal(two[1].cls[:, 32:], ours[1].cls) and two[2].registers.shape == (2, 4, 64)


def test_layers_by_name():
    model, network = vit(depth=3, **DINOV3), convnext()
    for name, layer in [
        ("cls_token", 0),
        ("patch_embed.weight", 0),
        ("mask_token", 0),
        ("blocks.0.ls1.gamma", 1),
        ("blocks.2.mlp.fc1.bias", 3),
        ("norm.weight", 4),
    ]:
        assert model.layer_of(name) == (layer, 4), name
    for name, layer in [
        ("downsample_layers.0.0.weight", 0),
        ("stages.0.0.gamma", 1),
        ("downsample_layers.1.1.bias", 2),
        ("stages.1.0.norm.weight", 2),
        ("stages.2.1.dwconv.bias", 5),
        ("stages.3.0.gamma", 7),
        ("norm.bias", 8),
    ]:
        assert network.layer_of(name) == (layer, 8), name
    for body in (model, network):
        assert all(0 <= body.layer_of(name)[0] <= body.layer_of(name)[1] for name, _ in body.named_parameters())


def test_convnext_drop_path_and_refusals():
    model, x = convnext(drop_path=0.5).train(), images(64, 64, 4)
    torch.manual_seed(0)
    first = model(x).cls
    torch.manual_seed(0)
    assert torch.equal(model(x).cls, first) and not torch.allclose(model.eval()(x).cls, first)
    block, maps = ConvBlock(4, 0.5, 0.3, 1e-6), torch.randn(8, 4, 6, 6)
    noise(block)
    change, whole = block.train()(maps) - maps, block.eval()(maps) - maps
    kept = change.flatten(1).any(1)
    assert kept.sum() == 5  # ⌊8 · 0.7⌋
    torch.testing.assert_close(change[kept], whole[kept] * 8 / 5)
    for options in ({"mask": torch.zeros(4, 4)}, {"layers": 2}):
        with pytest.raises(ValueError, match="a ConvNeXt takes no mask"):
            model(x, **options)
    with pytest.raises(ValueError, match="a ConvNeXt takes no mask"):
        model([x], mask=[torch.zeros(4, 4)])
    with pytest.raises(ValueError, match="16×64 pixels is less than one cell of 32 pixels"):
        model(images(16, 64))
    with pytest.raises(ValueError, match="must be of one length"):
        convnext(widths=[8, 16])
    for key, value in [("rope_rescale", 0.5), ("rope_jitter", 0.0), ("rope_shift", -1.0)]:
        with pytest.raises(ValueError, match=f"model.{key} = {value}: must be"):
            vit(positions="rope", **{key: value})


# ---------------------------------------------------------------- descriptions that anybody may have written
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dim": 1 << 20}, r"describes [\d,]+ parameters, but its files of weights have only [\d,]+ bytes"),
        ({"depth": 1 << 40}, "model.depth = 1099511627776: must be from 1 to 1000"),
        ({"depth": 900}, "parameters, but its files"),
        ({"image_size": 1 << 40}, "model.image_size = 1099511627776: must be from 1 to 32768"),
        ({"patch_size": -16}, "model.patch_size = -16: must be from 1 to 2.30"),
        ({"heads": 0}, "model.heads = 0: must be from 1 to 2.30"),
        (
            {"heads": 7},
            "does not describe a model that can be built .model.dim = 32 must be a multiple of model.heads = 7",
        ),
        ({"mlp_ratio": 1e300}, "must be above 0 and at most 1000"),
        ({"name": 3}, "unlabeled.model.name is 3, not str"),
        ({"name": "x"}, "model.name = 'x': no such model"),
    ],
)
def test_a_description_is_compared_with_its_file_before_it_is_built(
    shards: Path, tmp_path: Path, change: dict, says: str
):
    folder = described(tmp_path, lambda fields: fields["unlabeled"]["model"].update(change))
    with pytest.raises(UserError, match=says):
        weights.load_backbone(folder)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hidden_size", 1 << 20, "parameters, but its files"),
        ("num_attention_heads", 0, "num_attention_heads is 0, not 1 or more"),
        ("num_hidden_layers", 10**9, "must be from 1 to 1000"),
        ("intermediate_size", "x", "intermediate_size is 'x', not int"),
        ("rope_parameters", [], "rope_parameters is list, not an object"),
        ("model_type", [], "model_type is .., not str"),
        ("layer_norm_eps", {}, "layer_norm_eps is {}, not float"),
    ],
)
def test_fields_of_transformers_that_say_anything(tmp_path: Path, key: str, value: object, says: str):
    folder = described(tmp_path, lambda fields: (fields.pop("unlabeled"), fields.update({key: value})))
    with pytest.raises(UserError, match=says) as error:
        weights.load_backbone(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udc80", '{"model_type": "vit"'])
def test_a_config_that_is_none(tmp_path: Path, text: str):
    folder = described(tmp_path, lambda fields: None)
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config.json: is no description of a model|config.json has neither"):
        weights.load_backbone(folder)


def test_an_index_of_tensors_names_files_beside_it(tmp_path: Path):
    folder = described(tmp_path, lambda fields: None)
    for content, says in (
        ('{"weight_map": {"a": "../../x.safetensors"}}', "is not in the index's folder"),
        ("[", "is not an index of tensors"),
        ('{"weight_map": {"a": 1}}', "weight_map.a is 1, not str"),
    ):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match=says):
            weights.load_backbone(folder)


def described(folder: Path, change: Callable[[dict], object]) -> Path:
    """A tiny export whose config.json was changed."""
    cfg = families.ViT(
        image_size=32, patch_size=8, dim=32, depth=1, heads=2, positions="rope", registers=1, layer_scale=1.0
    )
    cfg.name = "vit"
    target = folder / "export"
    export.write(target, build_model(cfg), {"step": 1, "objective": "mae", "pool": "cls"}, [0.5] * 3, [0.25] * 3)
    fields = json.loads((target / "config.json").read_text())
    change(fields)
    (target / "config.json").write_text(json.dumps(fields))
    return target


@pytest.mark.parametrize(
    ("preset", "changes", "layers"),
    [
        ("vit_micro", {"pooling": "attention"}, {"pos_embed": 0, "attention_pool.proj.weight": 4, "norm.bias": 4}),
        ("gpt_micro", {"tied": False}, {"embed.weight": 0, "blocks.1.norm2.weight": 2, "head.weight": 3}),
        ("bert_micro", {}, {"embed_norm.weight": 0, "blocks.0.norm2.bias": 1, "head.bias": 3}),
        ("videomae_micro", {}, {"patch_embed.bias": 0, "blocks.0.norm1.weight": 1, "norm.bias": 4}),
        ("conformer_micro", {}, {"embed_norm.bias": 0, "blocks.0.norm5.weight": 1}),
    ],
)
def test_layers_of_each_family(preset: str, changes: dict[str, object], layers: dict[str, int]):
    cls, values = presets.choose(preset)
    cfg = cls(**{**values, **changes})
    cfg.name = preset
    with torch.device("meta"):
        model = build_model(cfg)
    names = dict(model.named_parameters())
    assert {name: model.layer_of(name)[0] for name in layers} == layers and layers.keys() <= names.keys()
    assert {model.layer_of(name)[1] for name in names} == {len(model.blocks) + 1}
