"""Each objective with a pretext task against its paper's formula, as in test_catalogue.py: plain loops in float64, values
and gradients. tests/parity/test_distributed.py compares two processes with one."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError
from data_pipeline.parts.part import About
from pretrain.build import build_objective
from pretrain.checkpoint.load import load_model
from pretrain.checkpoint.open_store import run_store
from pretrain.checkpoint.store import checkpoint_name
from pretrain.interchange import export
from pretrain.interchange.weight_sources import further_tensors
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.objectives import context_encoder, finder
from pretrain.objectives.base import Exported, Objective
from pretrain.ops.codebook import Codebook, nearest
from pretrain.ops.gather import world
from pretrain.ops.reverse_gradient import reverse_gradient
from pretrain.ops.sync_norm import BatchNorm
from pretrain.ops.upsampling import doublings, upsampling
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.parity import test_catalogue
from tests.parity.test_catalogue import agrees, encode, gradients, patches
from tests.parity.test_losses import mean, naive_cross_entropy, normal

OPTIONS: dict[str, dict[str, Any]] = {
    "rotnet": {},
    "jigsaw": {"permutations": 7, "tile_size": 16, "cell_size": 20, "tile_features": 5, "head_hidden": 6},
    "vqvae": {"codebook_size": 6, "codebook_decay": 0.9, "restart_below": 0.85, "decoder_dim": 8, "decoder_depth": 1},
    "beit": {},
    "context_encoder": {
        **{"dropped_region": "center", "border_weight": 3.0},
        **{"decoder_dim": 8, "discriminator_dim": 4, "adversarial_weight": 0.3},
    },
}
# A layer within each channel has a weight for every pair of places, of which MODELS["resnet"] has too many.
SMALL_MAP = families.ResNet(stem="small", widths=[4, 4, 4, 8], depths=[1, 1, 1, 1])
VIT_ONLY = ("beit", "context_encoder")  # of MODELS
PAIRS = [(name, model) for name in OPTIONS for model in test_catalogue.MODELS if model == "vit" or name not in VIT_ONLY]


def made(name: str, model: str | families.Model = "vit", **options: Any) -> Objective:
    with tempfile.TemporaryDirectory() as folder:
        named = {"visual_tokenizer": write_tokenizer(Path(folder))} if name == "beit" else {}
        return test_catalogue.made(name, model, **{**OPTIONS[name], **named, **options})


def write_tokenizer(folder: Path, in_channels: int = 3) -> str:
    """An export of an encoder of 4 pixels per token, with a codebook of 9 vectors."""
    cfg = families.ViT(image_size=16, patch_size=4, dim=16, depth=1, heads=2, in_channels=in_channels)
    cfg.name = "vit"
    torch.manual_seed(3)
    body, codebook = build_model(cfg), torch.randn(9, 16)
    about = {"step": 1, "objective": "vqvae", "pool": "mean"}
    export.write(folder / "1", body, about, [0.5] * in_channels, [0.25] * in_channels, further={"codebook": codebook})
    return str(folder / "1")


def whole_numbers(limit: int, *shape: int) -> Tensor:
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(0))


def batch_of(name: str, count: int = 4, size: int = 32) -> dict[str, Tensor]:
    image = normal(count, 3, size, size)
    if name == "rotnet":
        return {"image": normal(count, 4, 3, 32, 32)}
    if name == "jigsaw":
        return {"tiles": normal(count, 9, 3, 16, 16), "permutation": whole_numbers(7, count)}
    if name == "vqvae":
        return {"image": image, "candidates": patches(count, 2), "order": whole_numbers(1 << 62, count, 2)}
    if name == "beit":
        masked = normal(count, 16).argsort(1)[:, :6].sort(1).values
        return {"image": image, "visual": normal(count, 3, 16, 16, seed=1), "masked": masked}
    return {"image": image, "region": (3 * normal(count, size, size, seed=2).sigmoid()).to(torch.uint8)}


def one_hot(index: int, count: int) -> Tensor:
    return torch.eye(count, dtype=torch.float64)[index]


# ---------------------------------------------------------------- the papers' formulas
def naive_rotnet(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """1803.07728, eqs. 2 and 3."""
    terms = []
    for rotations in batch["image"]:
        logits = [model.head.weight @ x + model.head.bias for x in encode(model.backbone, rotations)]
        terms.append(mean([naive_cross_entropy(x, one_hot(y, 4), 1.0) for y, x in enumerate(logits)]))
    return mean(terms)


def naive_jigsaw(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """1603.09246, §3.1: tile by tile and channel by channel."""
    terms = []
    for pieces, number in zip(batch["tiles"], batch["permutation"], strict=True):
        features = []
        for piece in pieces:
            channels = []
            for channel in piece:
                centre = channel.sum() / channel.numel()
                variance = ((channel - centre) ** 2).sum() / channel.numel()
                channels.append((channel - centre) / (variance + 1e-6).sqrt())
            x = encode(model.backbone, torch.stack(channels)[None])[0]
            features.append((model.tile_head[0].weight @ x + model.tile_head[0].bias).clamp(min=0))
        hidden = (model.head[0].weight @ torch.cat(features) + model.head[0].bias).clamp(min=0)
        logits = model.head[2].weight @ hidden + model.head[2].bias
        terms.append(naive_cross_entropy(logits, one_hot(int(number), 7), 1.0))
    return mean(terms)


def nearest_by_loop(x: Tensor, vectors: Tensor) -> int:
    return min(range(len(vectors)), key=lambda k: float((x - vectors[k]).detach().square().sum()))


def naive_vqvae(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """1711.00937, eqs. 1 to 3. The gradient that the decoder passes to the codes is passed on to the encoder."""
    restored, commitments = [], []
    for image in batch["image"]:
        z = model.backbone(image[None]).tokens[0]
        e = torch.stack([model.codebook.vectors[nearest_by_loop(x, model.codebook.vectors)] for x in z])
        e = e.detach().requires_grad_()
        commitments += [(x - y.detach()).square().mean() for x, y in zip(z, e, strict=True)]
        side = round(len(z) ** 0.5)
        error = (model.decoder(e.T.reshape(1, -1, side, side))[0] - image).square().mean()
        (gradient,) = torch.autograd.grad(error, e, retain_graph=True)
        through = (gradient.detach() * z).sum()
        restored.append(error + through - through.detach())
    return mean(restored) + 0.25 * mean(commitments)


def naive_beit(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """2106.08254, eqs. 1 and 2, patch by patch."""
    terms = []
    for image, visual, masked in zip(batch["image"], batch["visual"], batch["masked"], strict=True):
        tokens = model.tokenizer(visual[None].detach()).tokens[0]
        mask = torch.tensor([i in masked.tolist() for i in range(16)])
        h = model.backbone(image[None], mask=mask[None]).tokens[0]
        for i in masked.tolist():
            logits = model.head.weight @ h[i] + model.head.bias
            terms.append(naive_cross_entropy(logits, one_hot(nearest_by_loop(tokens[i], model.codebook), 9), 1.0))
    return mean(terms)


def by_layer(layers: nn.Module, x: Tensor) -> Tensor:
    """Image by image; batch norms by the batch's own mean and variance of each channel."""
    for layer in layers.children():
        if isinstance(layer, nn.Sequential):
            x = by_layer(layer, x)
        elif isinstance(layer, BatchNorm):
            channels = []
            for c in range(x.shape[1]):
                values = x[:, c]
                centre = values.sum() / values.numel()
                variance = ((values - centre) ** 2).sum() / values.numel()
                channels.append((values - centre) / (variance + 1e-5).sqrt() * layer.weight[c] + layer.bias[c])
            x = torch.stack(channels, 1)
        else:
            x = torch.cat([layer(one[None]) for one in x])
    return x


def naive_context_encoder(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """1604.07379, eqs. 1 to 3: D descends its own loss; encoder and decoder ascend it through a frozen copy of D."""
    maps = []
    for image, region in zip(batch["image"], batch["region"], strict=True):
        tokens = model.backbone((image * (region != 1))[None]).tokens[0]  # [N, D]
        mixed = torch.stack([tokens[:, d] @ model.mix.weight[d] for d in range(tokens.shape[1])])
        side = round(len(tokens) ** 0.5)
        maps.append(mixed.view(-1, side, side))
    predicted = by_layer(model.decoder, torch.stack(maps))
    errors, real, fake = [], [], []
    for x, y, region in zip(batch["image"], predicted, batch["region"], strict=True):
        count = 3 * int((region > 0).sum())
        errors.append(
            (((x - y) ** 2) * (region == 1)).sum() / count + 3 * (((x - y) ** 2) * (region == 2)).sum() / count
        )
        real.append(x * (region > 0))
        fake.append(y * (region > 0))
    frozen = copy.deepcopy(model.discriminator).requires_grad_(False)

    def of_fakes(network: nn.Module, images: Tensor) -> Tensor:
        return mean([-(1 - d.sigmoid()).log() for d in by_layer(network, images).flatten()])

    of_real = mean([-d.sigmoid().log() for d in by_layer(model.discriminator, torch.stack(real)).flatten()])
    against = of_fakes(frozen, torch.stack(fake))
    loss = of_real + of_fakes(model.discriminator, torch.stack(fake).detach())
    descended = 0.999 * mean(errors) + loss - 0.3 * against
    return descended - descended.detach() + (0.999 * mean(errors) - 0.3 * loss).detach()  # the value is that of eq. 3


NAIVE: dict[str, Callable[..., Tensor]] = {
    "rotnet": naive_rotnet,
    "jigsaw": naive_jigsaw,
    "vqvae": naive_vqvae,
    "beit": naive_beit,
    "context_encoder": naive_context_encoder,
}


@pytest.mark.parametrize("name", NAIVE)
def test_it_computes_its_paper(name: str):
    agrees(made(name), batch_of(name), NAIVE[name], constant=("visual",))


def test_context_encoders_of_a_resnet_compute_their_paper():
    case = made("context_encoder", SMALL_MAP)
    case.get_submodule("backbone").eval()  # the formula encodes image by image
    agrees(case, batch_of("context_encoder", 2, 64), naive_context_encoder)


def test_context_encoders_without_discriminator():
    """The mean error of the pixels of the region, all of which have the same weight if it is a random one."""
    case = made("context_encoder", dropped_region="random", adversarial_weight=0.0).train()
    batch = batch_of("context_encoder")
    batch["region"] = (batch["region"] > 0).to(torch.uint8)
    loss, logs = case(batch, 0)
    predicted, inside = case.predict(batch["image"], batch["region"].unsqueeze(1)), batch["region"].bool()
    errors = [((x - y)[:, m] ** 2).mean() for x, y, m in zip(batch["image"], predicted, inside, strict=True)]
    assert set(logs) == {"reconstruction"} and not any("discriminator" in name for name, _ in case.named_modules())
    torch.testing.assert_close(loss, 0.999 * mean(errors))


def test_networks_are_the_published_ones():
    """Of 128 pixels, as in the code published for 1604.07379: 4 × 4 convolutions of stride 2, batch norm except in
    the first and last layer. The decoder of 1711.00937: two residual blocks, two transposed convolutions."""

    def shapes(layers: nn.Module) -> list[tuple[int, ...]]:
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        return [
            (x.in_channels, x.out_channels, *x.kernel_size[:1], *x.stride[:1])
            for x in layers.modules()
            if isinstance(x, kinds)
        ]

    judge = context_encoder.discriminator(3, 128, 64)
    assert shapes(judge) == [(3, 64, 4, 2), (64, 128, 4, 2), (128, 256, 4, 2), (256, 512, 4, 2), (512, 512, 4, 2)]
    assert [x.num_features for x in judge if isinstance(x, BatchNorm)] == [128, 256, 512, 512]
    widths = upsampling([512, 256, 128, 64, 3], norm=True)
    assert shapes(widths) == [(512, 256, 4, 2), (256, 128, 4, 2), (128, 64, 4, 2), (64, 3, 4, 2)]
    assert [x.num_features for x in widths if isinstance(x, BatchNorm)] == [256, 128, 64]
    assert widths(torch.zeros(2, 512, 3, 3)).shape == (2, 3, 48, 48)
    decoder = made("vqvae", "resnet", decoder_dim=256, decoder_depth=2).decoder
    blocks = [(256, 256, 3, 1), (256, 256, 1, 1)] * 2
    assert shapes(decoder) == [(16, 256, 3, 1), *blocks, (256, 3, 4, 2)]
    block, x = decoder[1], normal(1, 256, 4, 4)
    torch.testing.assert_close(block(x), x + block[3](block[1](x.clamp(min=0)).clamp(min=0)))


# ---------------------------------------------------------------- the codebook
def test_the_codebook_follows_by_moving_averages():
    """1711.00937, appendix A.1, over two steps of two micro-batches; a skipped step changes nothing."""
    book = Codebook(5, 3).double()
    vectors, counts, sums = book.vectors.clone(), [0.0] * 5, [torch.zeros(3, dtype=torch.float64)] * 5
    for step in range(2):
        halves = normal(12, 3, seed=step).chunk(2)
        for z in halves:
            codes, found = book(z)
            assert codes.tolist() == [nearest_by_loop(x, vectors) for x in z]
            assert torch.equal(found, book.vectors[codes])
            book.hold(z, codes, z[:1], torch.zeros(1), step)
        codes = [nearest_by_loop(x, vectors) for x in torch.cat(halves)]
        for k in range(5):
            own = [x for x, code in zip(torch.cat(halves), codes, strict=True) if code == k]
            counts[k] = 0.9 * counts[k] + 0.1 * len(own)
            sums[k] = 0.9 * sums[k] + 0.1 * sum(own, torch.zeros(3, dtype=torch.float64))
            vectors[k] = sums[k] / counts[k] if counts[k] else vectors[k]
        before, held = copy.deepcopy(book.state_dict()), list(book.held)
        book.update(step, 0.9, 0.0, torch.ones(()))
        assert all(torch.equal(value, before[key]) for key, value in book.state_dict().items())
        book.held = held
        book.update(step, 0.9, 0.0, torch.zeros(()))
        torch.testing.assert_close(book.vectors, vectors)
        shares = [count / sum(counts) for count in counts if count]
        assert float(book.perplexity()) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    with pytest.raises(RuntimeError, match=r"update\(2\) without a hold"):
        book.update(2, 0.9, 0.0)


def test_codes_without_use_are_replaced_in_order():
    book = Codebook(4, 2).double()
    book.vectors.copy_(torch.tensor([[9.0, 9.0], [0.0, 0.0], [9.0, -9.0], [-9.0, 9.0]]))
    z = 0.1 * normal(6, 2)
    book.hold(z, book(z)[0], z[:2].flip(0), torch.tensor([7, 2]), 0)
    book.update(0, 0.9, 0.2)
    torch.testing.assert_close(book.vectors, torch.stack([z[0], z.mean(0), z[1], torch.tensor([-9.0, 9.0]).double()]))
    torch.testing.assert_close(book.usage, torch.tensor([0.03, 0.6, 0.03, 0], dtype=torch.float64))
    torch.testing.assert_close(book.totals[2], 0.03 * z[1])


def test_codes_that_are_used_evenly_are_kept():
    """Also in the first steps, when their moving averages are still small; what is held has no graph."""
    book = Codebook(8, 4).double()
    z = book.vectors.repeat(3, 1).requires_grad_()
    before = book.vectors.clone()
    book.hold(z * 1.0, book(z)[0], z + 1, torch.arange(24), 0)
    assert not any(x.requires_grad for x in book.held[0])
    book.update(0, 0.99, 0.5)
    torch.testing.assert_close(book.vectors, before)
    assert float(book.perplexity()) == pytest.approx(8)


def test_candidates_are_distinct_and_enough_for_all_codes():
    cls, (config, _) = finder.find("vqvae"), finder.config_class("vqvae")
    view = cls.views(config(codebook_size=30), About(image_size=32, patch_size=8))
    image = np.zeros((40, 40, 3), np.uint8)
    arrays = [view({"image": image, "batch": 4}, lambda k, n=n: np.random.default_rng([n, k])) for n in range(4)]
    assert all(len(set(made["candidates"].tolist())) == 8 and max(made["candidates"]) < 16 for made in arrays)
    order = np.concatenate([made["order"] for made in arrays])
    assert order.dtype == np.int64 and len(set(order.tolist())) == 32 and order.max() > 1 << 53


def test_codes_do_not_depend_on_autocast():
    z, vectors = normal(2048, 8).float(), normal(256, 8, seed=1).float()  # bf16 would change 26 codes
    expected = nearest(z, vectors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(z, vectors), expected)


@pytest.fixture(scope="module")
def tokenizer(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, Any]:
    """A run of vqvae of two steps, its recipe, and the objective with its last weights."""
    cfg = tiny_recipe("vqvae", shards, tmp_path_factory.mktemp("tokenizer") / "run", "steps=2")
    run, trained = train(cfg), build_objective(cfg)
    load_model(run_store(run, cfg), checkpoint_name(2), trained)
    return run, cfg, trained


def test_the_tokenizer_is_exported_with_its_codebook(tokenizer: tuple[Path, Recipe, Any], tmp_path: Path):
    run, cfg, trained = tokenizer
    codebooks = [further_tensors(run / "export" / step)["codebook"] for step in ("0", "2")]
    assert codebooks[1].shape == (32, 32) and not torch.equal(*codebooks)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(1 <= row["perplexity"] <= 32 for row in rows)
    (folder,) = export.save(tmp_path / "2", trained, cfg, 2, run=run)
    one = trained.exports()["model"]
    assert export.holds(folder, one, 2)
    assert not export.holds(folder, Exported(one.backbone, "mean", {"codebook": codebooks[0]}), 2)
    (folder / "tensors.safetensors").unlink()
    assert not export.holds(folder, one, 2)
    export.save(folder, trained, cfg, 2, run=run)
    assert export.holds(folder, one, 2)


@pytest.mark.parametrize(
    "broken, says",
    [
        ("not given", "visual_tokenizer is empty"),
        ("no folder", "no such folder"),
        ("no file", r"tensors\.safetensors is missing\)"),
        ("damaged", r"tensors\.safetensors: cannot be read \(.*\)"),
        ("another tensor", "holds no codebook"),
    ],
)
def test_beit_needs_a_tokenizer(broken: str, says: str, tmp_path: Path):
    where = write_tokenizer(tmp_path) if broken != "not given" else ""
    file = Path(where, "tensors.safetensors")
    if broken == "no folder":
        where += "0"
    elif broken == "no file":
        file.unlink()
    elif broken == "damaged":
        file.write_bytes(b"0")
    elif broken == "another tensor":
        save_file({"other": torch.zeros(1)}, file)
    with pytest.raises((ValueError, UserError), match=f"{says}; write an export of a run of vqvae"):
        made("beit", visual_tokenizer=where)


def test_beits_tokenizer_reads_as_many_channels(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"visual_tokenizer = .*: reads images of 1 channels, but model\.in_channels = 3"
    ):
        made("beit", visual_tokenizer=write_tokenizer(tmp_path, in_channels=1))


def test_beit_predicts_the_codes_that_a_trained_tokenizer_assigns(
    tokenizer: tuple[Path, Recipe, Any], shards: Path, tmp_path: Path
):
    run, _, trained = tokenizer
    named = f"objective.visual_tokenizer={run / 'export' / '2'}"
    beit: Any = build_objective(tiny_recipe("beit", shards, tmp_path / "other", named), start=True).double().train()
    x = normal(3, 3, trained.backbone.image_size, trained.backbone.image_size)
    expected = copy.deepcopy(trained).double().eval().reconstruct(x)[2]
    assert torch.equal(nearest(beit.tokenizer(x).tokens, beit.codebook), expected) and len(expected.unique()) > 1


def test_pictures_change_nothing(shards: Path, tmp_path: Path):
    """Batch norms of decoder and discriminator keep their statistics."""
    cfg = tiny_recipe("context_encoder", shards, tmp_path / "run", "objective.dropped_region=center")
    case = Engine(build_objective(cfg), cfg, torch.device("cpu"))
    before = copy.deepcopy(case.objective.state_dict())
    (picture,) = case.pictures(batch_of("context_encoder") | {"image": normal(4, 3, 32, 32).float()}).values()
    assert picture.shape == (3, 4 * 32, 3 * 32) and case.objective.training and case.objective.decoder.training
    assert all(torch.equal(value, before[key]) for key, value in case.objective.state_dict().items())
    with pytest.raises(KeyError):
        case.pictures({})
    assert case.objective.training and case.objective.decoder.training


# ---------------------------------------------------------------- other operations
def test_reversed_gradient():
    x, w = normal(3).requires_grad_(), normal(3, seed=1)
    y = reverse_gradient(x, 0.25)
    assert torch.equal(x, y)
    torch.testing.assert_close(torch.autograd.grad((w * y).sum(), x)[0], -0.25 * w)


def test_a_decoder_doubles():
    assert [doublings(n, "model.patch_size") for n in (2, 8, 16)] == [1, 3, 4]
    for wrong, right in ((14, "8 or 16"), (1, "2")):
        with pytest.raises(ValueError, match=rf"model\.patch_size = {wrong}: the decoder doubles maps; write {right}$"):
            doublings(wrong, "model.patch_size")


# ---------------------------------------------------------------- two processes
def check(name: str, model: str | families.Model, size: int = 32, **options: Any) -> dict[str, list[Tensor]]:
    """The loss of this process's images, its gradients, and the buffers after the step: see test_distributed.py."""
    objective, rank, ranks = made(name, model, **options).train(), *world()
    part = {key: value.chunk(ranks)[rank] for key, value in batch_of(name, size=size).items()}
    loss, _ = objective(part, 0)
    found = gradients(objective, loss, [])
    objective.skipped = torch.zeros(())
    objective.after_step(0)
    buffers = [value.double() for value in objective.buffers()]
    if name == "vqvae":
        usage = objective.codebook.usage
        at_limit = int((usage == usage.min()).sum())  # the codes that were replaced
        assert 1 < at_limit < len(usage) or not objective.cfg.restart_below, usage
        buffers.append(objective.codebook.perplexity())
    return {"mean": [loss.detach(), *found.values()], "same": buffers}
