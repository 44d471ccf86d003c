"""Our backbones compared with transformers, through exported folders: `AutoModel` computes the features of the
trained model. First, noise is added to every parameter, because zero biases, mask tokens and layer scales hide
mistakes. The second half compares dropped patches, lists of sizes and stacked layers with a forward in plain loops."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.errors import UserError
from data_pipeline.formats.pixels import PixelDtype
from data_pipeline.parts import image as parts
from data_pipeline.views.augmentations import center
from pretrain.interchange import export, model_card
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.models.layers import Backbone, DropPath, Features
from pretrain.models.positions import MAX_TABLES, interpolate_table
from pretrain.models.resnet import ResidualNetwork
from pretrain.models.vit import VisionTransformer
from pretrain.ops.sync_norm import BatchNorm
from tests.conftest import sampled

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
ABOUT = {"step": 3, "objective": "mae", "pool": "mean"}
SIZES = [(32, 32), (48, 64), (16, 64)]  # native; another; another shape with the native number of patches


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    return transformers


def noise(module: nn.Module, seed: int = 0) -> None:
    """Normal noise of 0.2 on every parameter and running mean; norm weights and running variances are around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            draw = 0.2 * torch.randn(value.shape, generator=generator)
            if isinstance(value, nn.Parameter) or name.endswith("running_mean"):
                owner = module.get_submodule(name.rpartition(".")[0])
                is_scale = isinstance(owner, (nn.LayerNorm, nn.BatchNorm2d)) and name.endswith("weight")
                value.copy_(draw + 1 if is_scale else draw)
            elif name.endswith("running_var"):
                value.copy_(draw.abs() + 0.5)
            elif name.endswith("num_batches_tracked"):
                value.fill_(7)


def vit(**options: object) -> VisionTransformer:
    cfg = families.ViT(**({"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4} | options))
    cfg.name = "vit"
    model = VisionTransformer(cfg).eval()
    noise(model)
    return model


def resnet(**options: object) -> ResidualNetwork:
    cfg = families.ResNet(**({"widths": [8, 12, 16], "depths": [2, 1, 2]} | options))
    cfg.name = "resnet"
    model = ResidualNetwork(cfg).eval()
    noise(model)
    return model


def images(height: int = 32, width: int = 32, count: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(height * width))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max([1.0, *theirs.abs().flatten().tolist()]))


def assert_same_features(ours: Features, sequence: Tensor, registers: int) -> None:
    """`sequence`: transformers' last_hidden_state, [B, 1 + R + N, D]."""
    assert_close(ours.cls, sequence[:, 0])
    assert_close(ours.registers, sequence[:, 1 : 1 + registers])
    assert_close(ours.tokens, sequence[:, 1 + registers :])


def open_with_transformers(hf: ModuleType, folder: Path) -> nn.Module:
    """AutoModel for a folder. Raises an error for a weight that is missing, unexpected or of another shape, which
    transformers would only log."""
    model, info = hf.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys() and not any(info.values()), info
    return model.eval()


def assert_round_trip(folder: Path, model: Backbone) -> None:
    again, about = export.load(folder)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (
        not again.training
        and about["pool"] == "mean"
        and about["step"] == 3
        and about["mean"] == MEAN
        and about["std"] == STD
    )


# ---------------------------------------------------------------- exported folders
# (positions, registers, layer_scale, mlp, qkv_bias)
VITS = [*itertools.product(["rope", "learned", "sincos"], [0, 4], [None, 0.5], ["gelu", "swiglu"], [True, False])]


@pytest.mark.parametrize("options", sampled(VITS, *VITS[::5], others=pytest.mark.slow), ids=str)
@torch.no_grad()
def test_vit(hf, tmp_path: Path, options: tuple[str, int, float | None, str, bool]):
    positions, registers, layer_scale, mlp, qkv_bias = options
    model = vit(
        positions=positions, registers=registers, layer_scale=layer_scale, mlp=mlp, qkv_bias=qkv_bias, mask_token=True
    )
    export.write(tmp_path / "out", model, ABOUT, MEAN, STD)
    theirs = open_with_transformers(hf, tmp_path / "out")
    kind = "DINOv3ViTModel" if positions == "rope" else "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    assert type(theirs).__name__ == kind and theirs.dtype == torch.float32
    for height, width in SIZES:
        x = images(height, width)
        mask = torch.rand(2, height * width // 64, generator=torch.Generator().manual_seed(1)) < 0.4
        assert mask[0].any() and not mask.all()
        ours = model(x)
        assert ours.grid == (height // 8, width // 8)
        assert_same_features(ours, theirs(x).last_hidden_state, registers)
        assert_close(ours.cls, theirs(x).pooler_output)
        assert_same_features(model(x, mask=mask), theirs(x, bool_masked_pos=mask).last_hidden_state, registers)
    assert_round_trip(tmp_path / "out", model)


@pytest.mark.parametrize(
    "options",
    [
        {"mask_token": False},
        {"mask_token": False, "registers": 2},
        {"mask_token": False, "positions": "rope"},
        {"in_channels": 1},
        {"patch_size": 16, "positions": "rope", "rope_base": 37.0},
        {"mlp_ratio": 2.5, "norm_eps": 1e-3},
        {"mlp": "swiglu", "mlp_ratio": 8 / 3},  # a width of 85: transformers' classes may round it up
        {"mlp": "swiglu", "mlp_ratio": 8 / 3, "registers": 2},
        {"mlp": "swiglu", "mlp_ratio": 8 / 3, "positions": "rope"},
    ],
    ids=str,
)
@torch.no_grad()
def test_vit_option(hf, tmp_path: Path, options: dict):
    model = vit(**options)
    export.write(tmp_path / "out", model, ABOUT, MEAN, STD)
    x = images(48, 64, channels=options.get("in_channels", 3))
    sequence = open_with_transformers(hf, tmp_path / "out")(x).last_hidden_state
    assert_same_features(model(x), sequence, options.get("registers", 0))
    assert_round_trip(tmp_path / "out", model)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@torch.no_grad()
def test_resnet(hf, tmp_path: Path, block: str):
    model = resnet(block=block)
    export.write(tmp_path / "out", model, ABOUT, MEAN, STD)
    theirs = open_with_transformers(hf, tmp_path / "out")
    assert type(theirs).__name__ == "ResNetModel"
    for height, width in [(64, 64), (48, 80)]:
        x = images(height, width)
        ours, out = model(x), theirs(x)
        assert ours.grid == out.last_hidden_state.shape[-2:]
        assert_close(ours.tokens.transpose(1, 2).unflatten(2, ours.grid), out.last_hidden_state)
        assert_close(ours.cls, out.pooler_output.flatten(1))
        assert ours.registers.shape == (2, 0, model.embed_dim)
    assert model.patch_size == 64 // theirs(images(64, 64)).last_hidden_state.shape[-1]
    assert_round_trip(tmp_path / "out", model)


@torch.no_grad()
def test_resnet_with_small_stem(tmp_path: Path):
    model = resnet(stem="small")
    export.write(tmp_path / "out", model, ABOUT, MEAN, STD)
    assert_round_trip(tmp_path / "out", model)
    again, _ = export.load(tmp_path / "out")
    assert model(images()).grid == (8, 8) and torch.equal(again(images()).tokens, model(images()).tokens)


@torch.no_grad()
def test_plain_vit_from_transformers(hf, tmp_path: Path):
    """The other direction: the file of transformers' `ViTModel` is loaded into our model."""
    from safetensors.torch import load_file

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 32,
        "patch_size": 8,
    }
    theirs = hf.ViTModel(hf.ViTConfig(**sizes, layer_norm_eps=1e-6), add_pooling_layer=False).eval()
    noise(theirs)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    ours = {"cls_token": state["embeddings.cls_token"], "pos_embed": state["embeddings.position_embeddings"]}
    names = {"patch_embed": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for i in range(2):
        block, layer = f"blocks.{i}", f"encoder.layer.{i}"
        names |= {f"{block}.norm1": f"{layer}.layernorm_before", f"{block}.norm2": f"{layer}.layernorm_after"}
        names |= {f"{block}.mlp.fc1": f"{layer}.intermediate.dense", f"{block}.mlp.fc2": f"{layer}.output.dense"}
        names |= {f"{block}.attn.proj": f"{layer}.attention.output.dense"}
        for part in ("weight", "bias"):
            thirds = [state[f"{layer}.attention.attention.{name}.{part}"] for name in ("query", "key", "value")]
            ours[f"{block}.attn.qkv.{part}"] = torch.cat(thirds)
    ours |= {f"{a}.{part}": state[f"{b}.{part}"] for a, b in names.items() for part in ("weight", "bias")}
    model = vit()
    model.load_state_dict(ours)
    assert_same_features(model(images()), theirs(images()).last_hidden_state, 0)
    x = images(48, 64)
    assert_same_features(model(x), theirs(x, interpolate_pos_encoding=True).last_hidden_state, 0)


def naive_resize(table: np.ndarray, grid: tuple[int, int], offset: float) -> np.ndarray:
    """The table [N, N, D] at other sizes: point i of n along a side reads the table at (i + 1/2) · N / (n + offset) −
    1/2, by the cubic convolution of Keys with a = −0.75, whose points outside of the table are those of its border."""

    def weight(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    side = len(table)
    out = np.zeros((*grid, table.shape[2]))
    for i, j in np.ndindex(*grid):
        row, column = ((k + 0.5) * side / (n + offset) - 0.5 for k, n in zip((i, j), grid, strict=True))
        for r in range(math.floor(row) - 1, math.floor(row) + 3):
            for c in range(math.floor(column) - 1, math.floor(column) + 3):
                there = table[min(max(r, 0), side - 1), min(max(c, 0), side - 1)]
                out[i, j] += weight(row - r) * weight(column - c) * there
    return out


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_position_tables_at_other_sizes(offset: float):
    """With an offset of 0.1 as DINOv2's code has it, and without as transformers has it, by formula; the model uses its
    option."""
    model = vit(position_offset=offset)  # 4 × 4 patches
    table = model.pos_embed[:, 1:].detach()
    for grid in [(4, 4), (6, 8), (3, 2), (7, 4)]:
        expected = naive_resize(table[0].unflatten(0, (4, 4)).double().numpy(), grid, offset if grid != (4, 4) else 0)
        found = interpolate_table(table, grid, False, offset)
        np.testing.assert_allclose(found[0].unflatten(0, grid).numpy(), expected, atol=1e-5)
    plain = vit()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images()).tokens, plain(images()).tokens)
        assert torch.equal(model(images(48, 64)).tokens, plain(images(48, 64)).tokens) == (offset == 0)


def picture(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array(
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
    )


def test_image_processor_sees_what_evaluation_sees(hf, tmp_path: Path):
    export.write(tmp_path / "out", vit(), ABOUT, MEAN, STD)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "out")
    for shape, levels in [((32, 32), 0), ((80, 80), 1), ((20, 20), 1), ((80, 40), 1), ((200, 300), 1)]:
        image = picture(*shape)
        theirs = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
        ours = parts.Image(mean=MEAN, std=STD).place(torch.from_numpy(center(image, 32)), torch.device("cpu"))
        difference = (ours - theirs).abs() * torch.tensor(STD).view(3, 1, 1) * 255
        assert difference.max() <= levels + 1e-3, (
            shape
        )  # Pillow and torch round differently, as does the order of crop and resize


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_image_processor_keeps_channels_and_units(hf, tmp_path: Path, channels: int, dtype: PixelDtype):
    """The model card's lines, on an array that needs neither resizing nor cropping."""
    rng = np.random.default_rng(0)
    image = rng.normal(100, 300, (32, 32, channels)) if dtype == "float32" else rng.integers(0, 256, (32, 32, channels))
    image, mean, std = image.astype(dtype), [0.3] * channels, [0.2] * channels
    about = {**ABOUT, "pixel_dtype": dtype}
    export.write(tmp_path / "out", vit(in_channels=channels), about, mean, std)
    card = model_card.write(tmp_path / "out").read_text()
    lines = [line[4:] for line in card.splitlines() if line.startswith("    ")]
    known = {"FOLDER": tmp_path / "out", "image": image}
    with torch.no_grad():
        exec("\n".join(lines), known)
        part = parts.Image(channels, mean=mean, std=std)
        placed = part.place(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()), torch.device("cpu"))
        ours = export.load(tmp_path / "out")[0](placed)
    assert_close(known["features"][:, 0], ours.cls)


@pytest.mark.slow
def test_folder_opens_where_only_transformers_is_known(tmp_path: Path):
    model = vit(positions="rope", registers=4)
    export.write(tmp_path / "out", model, ABOUT, MEAN, STD)
    Image.fromarray(picture(32, 32)).save(tmp_path / "image.png")
    program = """
import sys
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
pixels = AutoImageProcessor.from_pretrained("out")(Image.open("image.png"), return_tensors="pt")
print(AutoModel.from_pretrained("out").eval()(**pixels).pooler_output.sum().item())
assert not any(name in sys.modules for name in ("pretrain", "data_pipeline", "eval"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    x = parts.Image(mean=MEAN, std=STD).place(torch.from_numpy(center(picture(32, 32), 32))[None], torch.device("cpu"))
    with torch.no_grad():
        assert float(done.stdout) == pytest.approx(model(x).cls.sum().item(), rel=1e-4)


def test_export_replaces_a_folder_and_refuses_what_it_cannot_read(tmp_path: Path):
    folder = tmp_path / "out"
    export.write(folder, vit(), ABOUT, MEAN, STD)
    export.write(folder, vit(registers=2), ABOUT, MEAN, STD)
    assert export.load(folder)[0].cfg.registers == 2 and [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="is not an exported model"):
        export.load(tmp_path / "nothing")
    fields = json.loads((folder / "config.json").read_text())
    fields["unlabeled"]["model"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"weights do not fit its config: missing blocks\.2"):
        export.load(folder)
    del fields["unlabeled"], fields["model_type"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="neither model_type"):
        export.load(folder)


# ---------------------------------------------------------------- against plain loops
def naive_vit(model: VisionTransformer, image: Tensor, keep: list[int]) -> Tensor:
    """The tokens [1 + R + K, D] of one image [3, H, W] at the native size, with only the patches `keep`, in float64."""
    s, cfg = {key: value.double() for key, value in model.state_dict().items()}, model.cfg
    side, size, width = cfg.image_size // cfg.patch_size, cfg.patch_size, cfg.dim // cfg.heads

    def linear(x: Tensor, name: str) -> Tensor:
        return s[name + ".weight"] @ x + s.get(name + ".bias", 0.0)

    def norm(x: Tensor, name: str) -> Tensor:
        return (x - x.mean()) / (x.var(correction=0) + cfg.norm_eps).sqrt() * s[name + ".weight"] + s[name + ".bias"]

    def rotated(x: Tensor, place: int | None) -> Tensor:
        """Pairs (j, j + d/2) of one head's vector, rotated by the patch's angles; None: class token or register,
        which is not rotated."""
        if place is None or cfg.positions != "rope":
            return x
        out = torch.empty_like(x)
        for j in range(width // 2):
            axis, k = divmod(j, width // 4)
            coordinate = 2 * (divmod(place, side)[axis] + 0.5) / side - 1
            angle = 2 * math.pi * coordinate / cfg.rope_base ** (2 * k / (width / 2))
            a, b = x[j], x[j + width // 2]
            out[j], out[j + width // 2] = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
        return out

    tokens, places = [s["cls_token"][0, 0] + (s["pos_embed"][0, 0] if "pos_embed" in s else 0)], [None]
    for r in range(cfg.registers):
        tokens, places = [*tokens, s["registers"][0, r]], [*places, None]
    for place in keep:
        row, column = (size * n for n in divmod(place, side))
        patch = image.double()[:, row : row + size, column : column + size]
        token = (s["patch_embed.weight"] * patch).sum((1, 2, 3)) + s["patch_embed.bias"]
        tokens.append(token + (s["pos_embed"][0, 1 + place] if "pos_embed" in s else 0))
        places.append(place)
    for i in range(cfg.depth):
        qkv = [linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").view(3, cfg.heads, width) for x in tokens]
        mixed = []
        for one, place in zip(qkv, places, strict=True):
            heads = []
            for h in range(cfg.heads):
                scores = [
                    rotated(one[0, h], place) @ rotated(other[1, h], there)
                    for other, there in zip(qkv, places, strict=True)
                ]
                weights = (torch.stack(scores) / math.sqrt(width)).softmax(0)
                heads.append(sum(w * other[2, h] for w, other in zip(weights, qkv, strict=True)))
            mixed.append(linear(torch.cat(heads), f"blocks.{i}.attn.proj") * s.get(f"blocks.{i}.ls1.gamma", 1.0))
        tokens = [x + y for x, y in zip(tokens, mixed, strict=True)]
        for t, x in enumerate(tokens):
            hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            tokens[t] = x + linear(hidden, f"blocks.{i}.mlp.fc2") * s.get(f"blocks.{i}.ls2.gamma", 1.0)
    return torch.stack([norm(x, "norm") for x in tokens])


def test_tables_of_positions_are_kept_for_few_grids():
    """Because an encoder may get images of any size."""
    model = vit(positions="rope").eval()
    images = [torch.randn(1, 3, 8 * rows, 8) for rows in range(1, MAX_TABLES + 9)]
    with torch.no_grad():
        outputs = [model(image).cls for image in images]
        assert len(model._rotations) == MAX_TABLES and len(model._periods) == 1
        for image, output in zip(images, outputs, strict=True):
            assert torch.equal(model(image).cls, output)


@pytest.mark.parametrize("positions", ["rope", "learned", "sincos"])
@torch.no_grad()
def test_dropped_patches(positions: str):
    """`keep`, in any order and different for every image, equals a plain forward of these patches at their
    positions."""
    model, x = vit(positions=positions, registers=2, layer_scale=0.5), images()
    keep = torch.tensor([[3, 10, 7, 0, 12], [15, 1, 2, 9, 4]])
    ours = model(x, keep=keep)
    assert ours.grid == (4, 4) and ours.tokens.shape == (2, 5, 32)
    for i in range(2):
        expected = naive_vit(model, x[i], keep[i].tolist()).float()
        assert_close(torch.cat([ours.cls[i][None], ours.registers[i], ours.tokens[i]]), expected)
    everything = model(x, keep=torch.arange(16).expand(2, -1))
    assert_close(everything.tokens, model(x).tokens)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_list_of_sizes_is_separate_forwards(positions: str):
    """Values and gradients, with a mask for one input and dropped patches for another."""
    model = vit(positions=positions, registers=2, mask_token=True).double()
    inputs = [images(32, 32, 3), images(16, 16, 5), images(48, 64, 2)]
    masks = [torch.rand(3, 16) < 0.5, None, None]
    keeps = [None, None, torch.stack([torch.randperm(48)[:11] for _ in range(2)])]
    results = []
    for together in (True, False):
        leaves = [x.double().requires_grad_() for x in inputs]
        if together:
            features = model(leaves, mask=masks, keep=keeps)
        else:
            features = [model(x, mask=m, keep=k) for x, m, k in zip(leaves, masks, keeps, strict=True)]
        loss = sum(
            (f.cls.square().sum() + (f.tokens**3).sum() + f.registers.exp().sum()) * (i + 1)
            for i, f in enumerate(features)
        )
        gradients = torch.autograd.grad(loss, [*leaves, *model.parameters()])
        results.append((features, gradients))
    for one, other in zip(*(features for features, _ in results), strict=True):
        assert one.grid == other.grid
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(one[:3], other[:3], strict=True))
    for one, other in zip(*(gradients for _, gradients in results), strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


@torch.no_grad()
def test_last_layers_side_by_side():
    model, x = vit(depth=3, registers=2), images(48, 64)
    two, one = model(x, layers=2), model(x)
    shorter = vit(depth=3, registers=2)
    del shorter.blocks[2]
    for both, last, before in zip(two[:3], one[:3], shorter(x)[:3], strict=True):
        assert_close(both, torch.cat([before, last], dim=-1))
    assert two.grid == one.grid == (6, 8)


def test_training_after_inference_mode():
    """Positions that are kept between calls can be used in training after inference mode."""
    model = vit(positions="rope")
    with torch.inference_mode():
        model(images())
    model(images()).cls.sum().backward()
    assert model.patch_embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 30}, "model.dim = 30 must be a multiple of model.heads = 4"),
        ({"image_size": 36}, "model.image_size = 36 must be a multiple of model.patch_size = 8"),
        ({"dim": 24, "positions": "rope"}, "a head width that is a multiple of 4, not 6"),
        ({"dim": 30, "heads": 3, "positions": "sincos"}, "a width that is a multiple of 4, not 30"),
    ],
)
def test_vit_refuses(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        vit(**options)


def test_forward_refuses():
    model = vit()
    with pytest.raises(ValueError, match="36×32 pixels does not divide into patches of 8"):
        model(images(36, 32))
    with pytest.raises(ValueError, match="built without mask_token"):
        model(images(), mask=torch.zeros(2, 16, dtype=torch.bool))
    network = resnet()
    for options in ({"mask": torch.zeros(2, 1)}, {"keep": torch.zeros(2, 1).long()}, {"layers": 2}):
        with pytest.raises(ValueError, match="a ResNet takes no mask, no keep and layers=1 only"):
            network(images(), **options)
    with pytest.raises(ValueError, match="must be of one length"):
        resnet(widths=[8, 16])


def test_drop_path():
    """The branch gets an exact share of the images of each size, with their rotations; it is scaled so that its mean
    does not change. In evaluation it gets all images."""
    layer, shapes = DropPath(0.25), [(40, 2), (10, 5)]
    x = torch.zeros(130, 3)
    angle = torch.cat([torch.arange(40.0).repeat_interleave(2), torch.ones(50)]).view(130, 1, 1)
    seen = []

    def branch(x: Tensor, shapes: list, rotation: tuple) -> Tensor:
        seen.append((shapes, rotation))
        out = torch.ones_like(x)
        out[: shapes[0][0] * 2] *= rotation[0][: shapes[0][0] * 2, 0] + 1
        return out

    assert torch.equal(layer.eval()(x, shapes, branch, (angle, angle))[80:], x[80:] + 1) and seen[0][0] == shapes
    torch.manual_seed(0)
    first, second = layer.train()(x, shapes, branch, (angle, angle)).split([80, 50])
    assert seen[1][0] == [(30, 2), (7, 5)]  # ⌊40 · 0.75⌋ and ⌊10 · 0.75⌋
    first, second = first.view(40, -1), second.view(10, -1)
    assert (first[:, :1] == first).all() and (second[:, :1] == second).all()  # whole images
    assert second[:, 0].unique().tolist() == pytest.approx([0, 10 / 7]) and (second[:, 0] > 0).sum() == 7
    kept = first[:, 0].nonzero().flatten()
    assert len(kept) == 30
    torch.testing.assert_close(first[kept, 0], (kept + 1) * 40 / 30)  # each image has its own rotation
    assert [shape for shape, _ in seen] != [] and DropPath(0.9)(
        torch.zeros(2, 1), [(2, 1)], lambda x, *_: x + 1
    ).sum() == 2
    with pytest.raises(ValueError, match=r"model.drop_path = 1: must be at least 0 and below 1"):
        DropPath(1)


def test_the_residual_stream_of_a_convnext_has_the_compute_dtype():
    """Also after a layer scale, whose weights are fp32 under autocast."""
    model = build_model(families.ConvNeXt(image_size=64, widths=[8, 16], depths=[1, 2], layer_scale=0.1))
    found: list[torch.dtype] = []
    for stage in model.stages:
        for block in stage:
            block.register_forward_hook(lambda _, given, out: found.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 3, 64, 64))
    assert found == [torch.bfloat16] * 3


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_takes_weights_gathered_in_bf16(training: bool):
    """FSDP2 gathers weights in the compute dtype, while running statistics are fp32."""
    x = torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(0))
    norm, plain = BatchNorm(4).train(training), nn.BatchNorm1d(4).train(training)
    for each in (norm, plain):
        each.weight.data.copy_(torch.tensor([0.5, 1.0, 2.0, -1.0]))  # exact in bf16
    expected = plain(x)
    norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    assert torch.equal(norm(x), expected) and torch.equal(norm.running_var, plain.running_var)
    assert norm.num_batches_tracked == plain.num_batches_tracked == int(training)
    out = norm(x.bfloat16())
    assert out.dtype == torch.bfloat16 and torch.allclose(out.float(), expected, atol=0.05)


def test_batch_norm_of_one_row_is_its_bias():
    """Such as a single masked patch in the batch, which has no variance. Over several processes one of them may have it."""
    norm, x = BatchNorm(4), torch.randn(1, 4, requires_grad=True)
    norm.bias.data.fill_(0.5)
    out = norm(x)
    out.sum().backward()
    assert torch.equal(out, torch.full((1, 4), 0.5)) and torch.equal(x.grad, torch.zeros(1, 4))
    torch.testing.assert_close(norm.running_mean, 0.1 * x[0].detach())
    assert norm(torch.randn(2, 4)).std() > 0


def test_initial_weights_have_their_std():
    vit = build_model(families.ViT(image_size=32, patch_size=4, dim=96, depth=1, heads=3, initial_std=0.05))
    found = [vit.blocks[0].attn.qkv.weight, vit.blocks[0].mlp.fc1.weight, vit.pos_embed]
    assert [float(weight.detach().std()) for weight in found] == pytest.approx([0.05] * 3, rel=0.05)
