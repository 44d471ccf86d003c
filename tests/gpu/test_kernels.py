"""The kernels on a CUDA device compared with their plain modules on the same device: values and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain import kernels
from pretrain.kernels import flex_attention, norms, packed_attention, rotary
from pretrain.models.layers import LayerNorm, PackedAttention, Rotary
from pretrain.models.text_layers import MaskedAttention, Masks
from pretrain.models.text_mlp import RMSNorm
from tests.test_kernels import NETWORKS, near, network, results

CUDA = torch.device("cuda")
# (library, dtype): varlen computes in half precision only
CASES = [("xformers", torch.bfloat16), ("xformers", torch.float32), ("varlen", torch.bfloat16),
         ("flex", torch.bfloat16), ("flex", torch.float32)]  # fmt: skip
BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 2e-3}


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(CUDA, dtype)


def values(function: Any, leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out) * 0.5 + out.detach())]


@pytest.mark.parametrize(("library", "dtype"), CASES)
@pytest.mark.parametrize("shapes", [[(4, 201), (16, 41)], [(3, 261)], [(2, 201), (2, 145), (8, 50)]])
def test_packed_sizes(library: str, dtype: torch.dtype, shapes: list[tuple[int, int]]):
    total = sum(b * n for b, n in shapes)
    leaves = [draw(total, 6, 64, dtype=dtype, seed=seed) for seed in range(3)]
    kernel = kernels.attention_kernels(library)[PackedAttention]()
    plain = values(lambda *a: PackedAttention()(*a, shapes), leaves)
    near(values(lambda *a: kernel(*a, shapes), leaves), plain, dtype, BOUNDS[dtype])


@pytest.mark.parametrize(("library", "dtype"), CASES)
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 200), (False, 0)])
@pytest.mark.parametrize("key_heads", [8, 2])
def test_documents(library: str, dtype: torch.dtype, causal: bool, window: int, key_heads: int):
    length = 1000
    numbers = torch.zeros(3, length, dtype=torch.int64)
    numbers[1] = torch.arange(length) // 170
    numbers[2, 600:] = 1
    numbers[2, 960:] = -1
    numbers, places = numbers.to(CUDA), torch.arange(length, device=CUDA)
    leaves = [draw(3, length, h, 64, dtype=dtype, seed=h) for h in (8, key_heads, key_heads)]

    def run(masks: type[Masks], attention: type[MaskedAttention]) -> list[Tensor]:
        mask = masks()(places, places, [window], numbers, causal)[0]
        return values(lambda *a: attention()(*a, mask), leaves)

    table = kernels.attention_kernels(library)
    near(run(table[Masks], table[MaskedAttention]), run(Masks, MaskedAttention), dtype, BOUNDS[dtype])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("library", ["auto", "sdpa", "xformers", "varlen", "flex"])
def test_networks_in_bf16(library: str, name: str):
    """All kernels that `apply` chooses, in a step under autocast."""
    preset, options = NETWORKS[name]
    torch.manual_seed(0)
    model = network(preset, **options).train().to(CUDA)
    given: Any = torch.randint(0, 50, (3, 20), device=CUDA)
    if name == "vit":
        given = [torch.randn(4, 3, 32, 32, device=CUDA), torch.randn(3, 3, 16, 24, device=CUDA)]

    def run(model: nn.Module) -> Tensor:
        torch.manual_seed(3)
        with torch.autocast("cuda", torch.bfloat16):
            out = model(given)
            tokens = torch.cat([f.tokens.flatten(0, 1) for f in (out if isinstance(out, list) else [out])])
        tokens.float().square().mean().backward()
        return tokens.detach()

    replaced = copy.deepcopy(model)
    kernels.apply(replaced, CUDA, library, torch.bfloat16)
    near([run(replaced)], [run(model)], torch.bfloat16, 5e-2)
    assert all(p.grad is None or p.grad.isfinite().all() for p in replaced.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("plain", "kernel"), [(LayerNorm, norms.CudaLayerNorm), (RMSNorm, norms.CudaRMSNorm)])
def test_norms(plain: type[nn.Module], kernel: type[nn.Module], dtype: torch.dtype):
    module, x = plain(384, 1e-6).to(CUDA), draw(500, 384, dtype=dtype, seed=0)

    def run(kind: type[nn.Module]) -> list[Tensor]:
        module.__class__ = kind
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return results(lambda x: module(x).cpu(), [x])

    near(run(kernel), run(plain), dtype, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotary(dtype: torch.dtype):
    assert rotary.trial(CUDA, dtype) < (0.05 if dtype == torch.bfloat16 else 1e-4)
    q, k = draw(2, 50, 8, 64, dtype=dtype, seed=0), draw(2, 50, 2, 64, dtype=dtype, seed=1)
    angles = torch.randn(2, 50, 1, 32, device=CUDA)
    tables = (angles.cos(), angles.sin())
    for one, other in zip(rotary.CompiledRotary()(q, k, tables), Rotary()(q, k, tables), strict=True):
        near([one], [other], dtype, BOUNDS[dtype])


def test_no_mask_of_all_pairs_and_no_wait():
    """Documents in a long row: less memory than one byte per pair of tokens, and no host sync."""
    length = 16384
    numbers = (torch.arange(length, device=CUDA) // 1500).unsqueeze(0)
    q = draw(1, length, 2, 64, dtype=torch.bfloat16, seed=0)
    places = torch.arange(length, device=CUDA)

    def run() -> None:
        mask = flex_attention.BlockMasks()(places, places, [0], numbers, True)[0]
        flex_attention.FlexMaskedAttention()(q, q, q, mask)

    run()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < length * length // 4


def test_masks_of_crops_are_built_once():
    first = packed_attention.block_diagonal((5, 5, 3), CUDA)
    assert packed_attention.block_diagonal((5, 5, 3), CUDA) is first and first.q_seqinfo.seqstart.is_cuda
    assert flex_attention.packed_mask(((2, 5), (1, 3)), CUDA) is flex_attention.packed_mask(((2, 5), (1, 3)), CUDA)
