"""Each kernel compared with the plain module that it replaces: values and gradients, in fp32 and bf16. For code that
needs a GPU, the masks are compared: xformers' masks as tensors, varlen's borders and windows as its documentation
defines them. `tests/gpu/test_kernels.py` runs the kernels."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask

from common.errors import ConfigError
from pretrain import kernels
from pretrain.build import build_objective
from pretrain.kernels import flex_attention, kernel_checks, norms, packed_attention, rotary
from pretrain.kernels.kernel_checks import Call
from pretrain.models import presets
from pretrain.models.build import build_model
from pretrain.models.layers import LayerNorm, PackedAttention, Rotary
from pretrain.models.text_layers import MaskedAttention, Masks, visible
from pretrain.models.text_mlp import RMSNorm
from tests.conftest import sampled, tiny_recipe

CPU = torch.device("cpu")
SHAPES = [(3, 20), (2, 7)]
LENGTHS = [20, 20, 20, 7, 7]
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7 + [2] * 8, [0] * 20, [0] * 14 + [1] * 3 + [-1] * 3])
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_small", {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "positions": "rope", "layer_scale": 0.5, "drop_path": 0.5}),
    "decoder": ("gpt_micro", {"dim": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "depth": 2, "windows": [6, 0], "vocab_size": 50}),
    "bert": ("bert_micro", {"dim": 32, "heads": 2, "depth": 2, "vocab_size": 50}),
    "t5": ("t5_micro", {"dim": 32, "heads": 2, "head_dim": 16, "depth": 2, "vocab_size": 50, "max_distance": 16, "buckets": 8}),
}  # fmt: skip


def near(ours: list[Tensor], plain: list[Tensor], dtype: torch.dtype, tolerance: float = 0.0) -> None:
    """bf16 has 8 bits, and kernels round at other positions."""
    bound = tolerance or {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one.double() - other.double()).norm() <= bound * other.double().norm() + 1e-12


def results(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The value of a function and the gradients of its weighted sum."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


def heads(count: int, tokens: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*tokens, count, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def network(preset: str, **options: Any) -> nn.Module:
    kind, values = presets.choose(preset)
    return build_model(kind(**{**values, **options}))


# ---------------------------------------------------------------- norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("plain", "kernel"),
    [(RMSNorm, norms.CpuRMSNorm), (RMSNorm, norms.CudaRMSNorm), (LayerNorm, norms.CudaLayerNorm)],
)
def test_norms(plain: type[nn.Module], kernel: type[nn.Module], dtype: torch.dtype):
    module = plain(24, 1e-5).to(torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(0)).to(dtype)

    def run(kind: type[nn.Module]) -> list[Tensor]:
        module.__class__ = kind
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return results(lambda x, *_: module(x), [x]) + [
                torch.autograd.grad(module(x).square().sum(), p)[0] for p in module.parameters()
            ]

    ours, theirs = run(kernel), run(plain)
    assert ours[0].dtype == dtype  # the residual stream keeps its dtype
    near(ours, theirs, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """As a GPU compiles it, but for the kernel that inductor writes there; each choice of heads, as in groups."""
    compiled = torch.compile(Rotary().forward, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(rotary, "_compiled", compiled)
    angles = torch.randn(30, 1, 8, generator=torch.Generator().manual_seed(2))
    tables = (angles.cos(), angles.sin())
    leaves = [heads(count, (30,), dtype, seed=count) for count in (4, 2)]
    ours, plain = (
        results(lambda q, k, m=module: torch.cat(m(q, k, tables), 1), leaves)
        for module in (rotary.CompiledRotary(), Rotary())
    )
    near(ours, plain, dtype)


# ---------------------------------------------------------------- attention by xformers and varlen, through their masks
def materialised(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, scale: float | None) -> Tensor:
    """The result of `memory_efficient_attention` for [1, T, H, d], with its mask as a tensor."""
    mask = attn_bias.materialize((q.shape[1], k.shape[1]), dtype=q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def by_borders(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa) -> Tensor:
    """The result of `varlen_attn`, sequence by sequence."""
    lengths = cu_seq_q.diff().tolist()
    assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32 and max_q == max_k == max(lengths)
    before, after = window_size
    out = []
    for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        places = torch.arange(len(parts[0]))
        distance = places.unsqueeze(1) - places
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen = seen & (distance <= before) if before >= 0 else seen
        seen = seen & (-distance <= after) if after >= 0 else seen
        each = (part.transpose(0, 1).unsqueeze(0) for part in parts)
        mixed = F.scaled_dot_product_attention(*each, seen, scale=scale, enable_gqa=enable_gqa)
        out.append(mixed.squeeze(0).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture(params=["xformers", "varlen", "flex"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The attention of a library; functions that need a GPU are replaced by ones that use their masks."""
    name = request.param
    if name == "xformers":
        module = pytest.importorskip("xformers.ops")
        monkeypatch.setattr(module, "memory_efficient_attention", materialised)
    elif name == "varlen":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_borders)
    else:  # runs on a CPU, but refuses gradients there
        flex = sys.modules["torch.nn.attention.flex_attention"]
        monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
        monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        # compiled for T5, as gradients of what is added to the scores are lost otherwise
        learned = "t5" in request.node.name
        attend = torch.compile(flex.flex_attention, backend="eager") if learned else flex.flex_attention
        monkeypatch.setattr(flex_attention, "attention", attend)
    return name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sizes(library: str, dtype: torch.dtype):
    q, k, v = (heads(2, (74,), dtype, seed) for seed in range(3))
    kernel = kernels.attention_kernels(library)[PackedAttention]()
    ours = results(lambda *a: kernel(*a, SHAPES), [q, k, v])
    near(ours, results(lambda *a: PackedAttention()(*a, SHAPES), [q, k, v]), dtype)


@pytest.mark.parametrize("dtype", sampled([torch.float32, torch.bfloat16], torch.float32, others=pytest.mark.slow))
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(library: str, name: str, dtype: torch.dtype):
    """Crops of two sizes with drop path; documents with causal masks, windows and groups of heads; documents without
    these."""
    preset, options = NETWORKS[name]
    torch.manual_seed(0)
    model = network(preset, **options).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    if name == "vit":
        given: Any = [torch.randn(4, 3, 32, 32), torch.randn(3, 3, 16, 24)]
        options = {}
    else:
        given, options = torch.randint(0, 50, (3, 20)), {"documents": DOCUMENTS}

    def run(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(3)  # drop path
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(given, **options)
            tokens = torch.cat([f.tokens.flatten(0, 1) for f in (out if isinstance(out, list) else [out])])
            if name == "t5":
                tokens = torch.cat([tokens, model.decoder(given, out.tokens, DOCUMENTS >= 0).flatten(0, 1)])
        loss = (tokens.float() * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(4))).sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return [tokens, *(g for g in found if g is not None)]

    replaced = copy.deepcopy(model)
    kernels.replace(replaced, kernels.attention_kernels(library))
    assert {type(m) for m in replaced.modules()} & set(kernels.attention_kernels(library).values())
    plain = run(model)
    if dtype == torch.float32:
        near(run(replaced), plain, dtype, 2e-5)
    else:  # through all layers
        near(run(replaced)[:1], plain[:1], dtype, 5e-2)


def test_sequences_of_one_size_are_a_batch(library: str, monkeypatch: pytest.MonkeyPatch):
    """The plain module needs no mask for them."""
    kind = kernels.attention_kernels(library)[PackedAttention]
    monkeypatch.delattr(kind, "_packed")
    q, k, v = (heads(2, (60,), torch.float32, seed) for seed in range(3))
    for shapes in ([(3, 20)], [(2, 20), (1, 20)]):  # two views have one size, too
        assert torch.equal(kind()(q, k, v, shapes), PackedAttention()(q, k, v, shapes))
    with pytest.raises(NotImplementedError):
        kind()(q, k, v, [(2, 20), (2, 10)])


CALLS = {
    "vit": (Call(2, 2, 16),),
    "decoder": tuple(Call(4, 2, 16, masked=True, causal=True, window=window) for window in (False, True)),
    "bert": (Call(2, 2, 16, masked=True),),
    "t5": tuple(Call(2, 2, 16, masked=True, causal=causal, relative=True, scale=1.0) for causal in (False, True)),
}


@pytest.mark.parametrize("name", sampled(NETWORKS, *{*NETWORKS} - {"t5"}, others=pytest.mark.slow))
def test_what_a_model_asks_of_a_library_is_tried(library: str, name: str, monkeypatch: pytest.MonkeyPatch):
    """With the model's heads, widths, groups, masks and windows; a library that computes one of them wrongly is
    detected."""
    preset, options = NETWORKS[name]
    calls = kernel_checks.calls_of(network(preset, **options))
    assert calls == CALLS[name]
    table = dict(kernels.attention_kernels(library))
    assert kernel_checks.difference(table, calls, CPU, torch.float32) < 1e-4
    wrong = dict(table)
    for plain, kind in ((MaskedAttention, "forward"), (PackedAttention, "_packed")):
        right = getattr(table[plain], kind)
        spoilt = {kind: lambda self, *args, right=right, **options: 1.1 * right(self, *args, **options)}
        wrong[plain] = type("Wrong", (table[plain],), spoilt)
    assert kernel_checks.difference(wrong, calls, CPU, torch.float32) > kernels.MAX_DIFFERENCE


LARGE = {
    "decoder": (Call(16, 4, 128, masked=True, causal=True, window=True),),
    "t5": tuple(Call(12, 12, 64, masked=True, causal=causal, relative=True, scale=1.0) for causal in (False, True)),
}


@pytest.mark.parametrize("name", sampled(LARGE, "decoder", others=pytest.mark.slow))
def test_rounding_is_not_taken_for_a_fault(library: str, name: str):
    """Gradients of a group's keys are sums over its heads, and T5 does not scale its scores. NaN is a fault."""
    table = dict(kernels.attention_kernels(library))
    assert kernel_checks.difference(table, LARGE[name], CPU, torch.bfloat16) < kernels.MAX_DIFFERENCE / 3
    forward = table[MaskedAttention].forward
    nan = {"forward": lambda self, *args, **options: forward(self, *args, **options) * torch.nan}
    table[MaskedAttention] = type("Nan", (table[MaskedAttention],), nan)
    assert kernel_checks.difference(table, LARGE[name], CPU, torch.bfloat16) == torch.inf


def test_windows_without_documents(library: str):
    """All rows of a batch share one mask."""
    places = torch.arange(20)
    leaves = [heads(2, (3, 20), torch.float32, seed) for seed in range(3)]

    def run(masks: type[Masks], attention: type[MaskedAttention]) -> list[Tensor]:
        mask = masks()(places, places, [6], None, True)[0]
        return results(lambda *a: attention()(*a, mask), leaves)

    table = kernels.attention_kernels(library)
    near(run(table[Masks], table[MaskedAttention]), run(Masks, MaskedAttention), torch.float32, 2e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("causal", [True, False])
def test_masks_of_documents_are_the_dense_ones(causal: bool, window: int):
    places = torch.arange(20)
    dense = visible(places, places, window if causal else 0, DOCUMENTS, causal)  # [B, 1, T, T]
    lengths = packed_attention.lengths_of(DOCUMENTS)
    assert lengths == (5, 7, 8, 20, 14, 3, 3)
    pytest.importorskip("xformers")
    mask = packed_attention.block_diagonal(lengths, CPU, causal, window if causal else 0)
    assert torch.equal(mask.materialize((60, 60)) == 0, torch.block_diag(*dense[:, 0]).bool())
    assert packed_attention.block_diagonal(lengths, CPU, causal, window if causal else 0) is mask  # built once


def test_masks_without_documents_are_for_windows_alone():
    """Then a row is one document, and without a window PyTorch's causal kernel needs no mask."""
    places = torch.arange(20)
    for kind in (packed_attention.SpanMasks, flex_attention.BlockMasks):
        masks = kind()(places, places, [0, 6, 32], None, True)
        assert [mask is None for mask in masks] == [True, False, True]
        assert torch.equal(kind()(places[12:], places, [0], None, True)[0], visible(places[12:], places, 0, None, True))


# ---------------------------------------------------------------- FlexAttention's blocks
@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (True, 300), (True, 1000), (True, 5)])
def test_blocks_hold_all_that_is_seen(causal: bool, window: int):
    """Blocks of 128 × 128: all pairs of a full block are visible, no pair of an omitted block is, and no block is
    listed twice."""
    length = 1100
    documents = torch.zeros(4, length, dtype=torch.int64)
    documents[1] = torch.arange(length) // 256
    documents[2] = torch.cat([torch.zeros(400), torch.ones(30), torch.full((600,), 2.0), torch.full((70,), -1.0)])
    documents[3] = torch.arange(length) // 50
    mask = flex_attention.block_mask(documents, causal, window)
    places = torch.arange(length)
    dense = visible(places, places, window, documents, causal)[:, 0]  # [B, T, T]
    assert torch.equal(create_mask(mask.mask_mod, 4, None, length, length, "cpu")[:, 0], dense)
    n = -(-length // 128)
    blocks = F.pad(dense, (0, n * 128 - length) * 2).unflatten(2, (n, 128)).unflatten(1, (n, 128)).transpose(2, 3)
    some, whole = blocks.flatten(3).any(3), blocks.flatten(3).all(3)  # [B, n, n]

    def listed(counts: Tensor, indices: Tensor) -> Tensor:
        out = torch.zeros(4, n, n, dtype=torch.bool)
        for b in range(4):
            for row in range(n):
                out[b, row, indices[b, 0, row, : counts[b, 0, row]].long()] = True
        return out

    partial, full = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any() and not (full & ~whole).any() and not (some & ~(partial | full)).any()
    assert torch.equal(full, whole) and (partial & ~some).sum() <= 0.1 * n * n * 4  # and little is computed in vain


# ---------------------------------------------------------------- apply
def test_names_and_parameters_stay(shards, tmp_path):
    for name in ("dinov3", "gpt"):
        objective = build_objective(tiny_recipe(name, shards, tmp_path))
        before, state = dict(objective.named_parameters()), objective.state_dict()
        kernels.replace(objective, kernels.CUDA | kernels.attention_kernels("flex"))
        assert list(objective.state_dict()) == list(state)
        assert all(before[key] is value for key, value in objective.named_parameters())
        kinds = {type(module) for module in objective.modules()}
        assert not kinds & {LayerNorm, RMSNorm, PackedAttention} and kinds & {norms.CudaLayerNorm, norms.CudaRMSNorm}


def test_on_a_cpu():
    model = network("gpt_micro")
    assert kernels.apply(model, CPU) == []
    kinds = {type(module) for module in model.modules()}
    assert norms.CpuRMSNorm in kinds and RMSNorm not in kinds and packed_attention.SpanMasks not in kinds


@pytest.mark.parametrize("choice", ["xformers", "varlen", "flex"])
def test_an_attention_that_cannot_be_used_here_is_refused(choice: str):
    says = f"parallel.attention = {choice}: needs a CUDA device, and this run computes on cpu; write parallel.attention=auto"
    with pytest.raises(ConfigError, match=says):
        kernels.apply(nn.Identity(), CPU, choice)


def test_the_reasons_of_a_choice_are_told(monkeypatch: pytest.MonkeyPatch):
    """On a GPU (here: what is asked before one is used), a library that is missing or refuses the dtype."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda = torch.device("cuda")
    calls = (*CALLS["vit"], *CALLS["decoder"])

    def missing(name: str, *_: object) -> float:
        if name == "rotary":
            return 0.0
        raise ImportError(f"no {name} here", name=name)

    monkeypatch.setattr(kernels, "_trial", missing)
    kernels.unusable.cache_clear()
    with pytest.raises(
        ConfigError, match=r"xformers: is not installed \(pip install 'unlabeled\[xformers\]'\); write parallel"
    ):
        kernels.kernels_of(cuda, "xformers", torch.bfloat16, calls)
    with pytest.raises(ConfigError, match=r"flex: cannot be imported \(no flex here\); write parallel"):
        kernels.kernels_of(cuda, "flex", torch.bfloat16, calls)
    table, lines = kernels.kernels_of(cuda, "auto", torch.bfloat16, calls)
    assert PackedAttention not in table and kernels.Rotary in table
    assert (
        lines[0]
        == "attention of crops of several sizes: sdpa, as xformers is not installed (pip install 'unlabeled[xformers]')"
    )
    monkeypatch.setattr(kernels, "_trial", lambda *_: 1.0)
    kernels.unusable.cache_clear()
    with pytest.raises(ConfigError, match="varlen: is off by 1 from plain operations here"):
        kernels.kernels_of(cuda, "varlen", torch.bfloat16, calls)
    monkeypatch.setattr(kernels, "_trial", lambda *_: 0.001)
    kernels.unusable.cache_clear()
    table, lines = kernels.kernels_of(cuda, "auto", torch.bfloat16, calls)
    assert table[PackedAttention] is packed_attention.XformersPackedAttention and "flex" in lines[1]
    for kind, line in (("vit", 0), ("decoder", 1)):  # what a model does not call is not tried
        table, own = kernels.kernels_of(cuda, "auto", torch.bfloat16, CALLS[kind])
        assert own == [lines[line]] and (PackedAttention in table) is (kind == "vit")
    _, (said,) = kernels.kernels_of(cuda, "varlen", torch.bfloat16, calls)
    assert said == "attention of documents: varlen, for which the host waits once in each forward"
    assert kernels.kernels_of(cuda, "varlen", torch.bfloat16, CALLS["vit"])[1] == []
    kernels.unusable.cache_clear()
