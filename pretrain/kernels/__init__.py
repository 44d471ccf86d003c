"""Kernels: classes that compute what a plain module of the models computes, faster on one kind of device.

`apply` is called once, when the engine is built, and nothing else in the project chooses by device. A kernel is a
subclass of the plain module with another `forward`, and takes its place by taking over the instance: parameters,
buffers and their names stay, so that checkpoints and exports do not depend on it. `tests/test_kernels.py` compares each
with its plain module, values and gradients.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from common.config import ConfigError
from pretrain.kernels import batch_norm, norms
from pretrain.models.layers import LayerNorm, PackedAttention, Rotary
from pretrain.models.text_layers import MaskedAttention, Masks
from pretrain.models.text_mlp import RMSNorm
from pretrain.ops.sync_norm import BatchNorm

Table = dict[type[nn.Module], type[nn.Module]]  # {plain module: kernel}
CUDA: Table = {
    LayerNorm: norms.CudaLayerNorm,
    RMSNorm: norms.CudaRMSNorm,
    BatchNorm: batch_norm.CudaBatchNorm,
}
CPU: Table = {RMSNorm: norms.CpuRMSNorm}
MAX_DIFFERENCE = 0.05  # from plain operations, of outputs and gradients of size 1; bf16 rounds to 0.004


def attention_kernels(name: str) -> Table:
    """The kernels of a choice of `parallel.attention` but "auto". Their files are imported here, as compilers are slow to
    import."""
    if name == "sdpa":
        return {}
    if name == "flex":
        from pretrain.kernels import flex_attention as flex

        return {
            PackedAttention: flex.FlexPackedAttention,
            Masks: flex.BlockMasks,
            MaskedAttention: flex.FlexMaskedAttention,
        }
    from pretrain.kernels import packed_attention as packed

    if name == "xformers":
        attention: Table = {
            PackedAttention: packed.XformersPackedAttention,
            MaskedAttention: packed.XformersMaskedAttention,
        }
    else:
        attention = {PackedAttention: packed.VarlenPackedAttention, MaskedAttention: packed.VarlenMaskedAttention}
    return {Masks: packed.SpanMasks, **attention}


def apply(
    objective: nn.Module, device: torch.device, attention: str = "auto", dtype: torch.dtype = torch.float32
) -> list[str]:
    """Replace the plain modules below `objective` that have a kernel for `device`; a line about each choice that was
    not certain.

    `attention`: the recipe's `parallel.attention`. `dtype`: of the computation. Raises ConfigError where the named
    attention cannot be used here.
    """
    table, lines = kernels_of(device, attention, dtype)
    replace(objective, table)
    return lines


def replace(module: nn.Module, table: Table) -> None:
    """Let the kernels of a table take over the plain modules below `module`."""
    for each in module.modules():
        kernel = table.get(type(each))
        if kernel is not None:
            each.__class__ = kernel


def kernels_of(device: torch.device, attention: str, dtype: torch.dtype) -> tuple[Table, list[str]]:
    """(the kernels for a device, lines for the log). With "auto", what cannot be used here is left plain."""
    if attention not in ("auto", "sdpa") and (reason := unusable(attention, device, dtype)):
        raise ConfigError(f"parallel.attention = {attention}: {reason}; write parallel.attention=auto")
    if device.type == "cpu":
        return CPU, []
    if device.type != "cuda":
        return {}, []
    if attention != "auto":
        return CUDA | attention_kernels(attention) | _fused_rotary(device, dtype)[0], []
    table, lines = dict(CUDA), []
    # crops of several sizes by xformers, as DINOv2 has it; documents and windows by FlexAttention, which alone builds
    # its masks without waiting for the device
    for name, kinds, what in (
        ("xformers", [PackedAttention], "crops of several sizes"),
        ("flex", [Masks, MaskedAttention], "documents and windows"),
    ):
        reason = unusable(name, device, dtype)
        table |= {} if reason else {kind: attention_kernels(name)[kind] for kind in kinds}
        lines.append(f"attention of {what}: {name if not reason else f'sdpa, as {name} {reason}'}")
    fused, reason = _fused_rotary(device, dtype)
    return table | fused, [*lines, *([f"rotary positions by plain operations: {reason}"] if reason else [])]


def _fused_rotary(device: torch.device, dtype: torch.dtype) -> tuple[Table, str]:
    if reason := unusable("rotary", device, dtype):
        return {}, reason
    from pretrain.kernels import rotary

    return {Rotary: rotary.CompiledRotary}, ""


@functools.cache
def unusable(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a kernel cannot be used here, or "". It computes a small example, forward and backward, and is compared with
    its plain module."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"needs a CUDA device, and this run computes on {'cpu' if device.type == 'cuda' else device.type}"
    try:
        difference = _trial(name, device, dtype)
    except ImportError as error:
        if error.name == "xformers":
            return "is not installed (pip install 'unlabeled[xformers]')"
        return f"cannot be imported ({error})"
    except (RuntimeError, NotImplementedError, ValueError, AssertionError) as error:
        kind, words = str(dtype).removeprefix("torch."), str(error).strip() or type(error).__name__
        return f"cannot be used here with {kind} ({words.splitlines()[0][:200]})"
    return "" if difference <= MAX_DIFFERENCE else f"is off by {difference:.2g} from plain operations here"


def _trial(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between a kernel and its plain module on a small example, outputs and gradients."""
    if name == "rotary":
        from pretrain.kernels import rotary

        return rotary.trial(device, dtype)
    shapes, results = [(2, 40), (1, 9)], []
    for kind in (PackedAttention, attention_kernels(name)[PackedAttention]):
        draw = torch.Generator(device).manual_seed(0)
        q, k, v, slope = (torch.randn(89, 2, 64, generator=draw, device=device, dtype=dtype) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = kind()(*leaves, shapes)
        results.append([out, *torch.autograd.grad(out, leaves, slope)])
    return max(float((one - other).abs().max()) for one, other in zip(*results, strict=True))
