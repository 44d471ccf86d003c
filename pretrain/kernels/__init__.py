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

from common.errors import ConfigError
from pretrain.kernels import batch_norm, norms, trial
from pretrain.kernels.trial import Call, calls_of
from pretrain.models.layers import LayerNorm, PackedAttention, Rotary
from pretrain.models.t5 import RelativeBias
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
    """The kernels of a choice of `parallel.attention` but "auto". Their files are imported here, as compilers are slow
    to import."""
    if name == "sdpa":
        return {}
    if name == "flex":
        from pretrain.kernels import flex_attention as flex

        return {
            PackedAttention: flex.FlexPackedAttention,
            Masks: flex.BlockMasks,
            RelativeBias: flex.FlexRelativeBias,
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
    not certain, or that makes the host wait.

    `attention`: the recipe's `parallel.attention`. `dtype`: of the computation. Raises ConfigError where the named
    attention cannot be used here.
    """
    table, lines = kernels_of(device, attention, dtype, calls_of(objective))
    replace(objective, table)
    return lines


def replace(module: nn.Module, table: Table) -> None:
    """Let the kernels of a table take over the plain modules below `module`."""
    for each in module.modules():
        kernel = table.get(type(each))
        if kernel is not None:
            each.__class__ = kernel


def kernels_of(
    device: torch.device, attention: str, dtype: torch.dtype, calls: tuple[Call, ...]
) -> tuple[Table, list[str]]:
    """(the kernels for a device, lines for the log). `calls`: what the model asks of its attention. With "auto", what
    cannot be used here is left plain."""
    if attention not in ("auto", "sdpa") and (reason := unusable(attention, device, dtype, calls)):
        raise ConfigError(f"parallel.attention = {attention}: {reason}; write parallel.attention=auto")
    if device.type == "cpu":
        return CPU, []
    if device.type != "cuda":
        return {}, []
    packed, masked = (tuple(call for call in calls if call.masked is kind) for kind in (False, True))
    if attention != "auto":
        waits = attention in ("xformers", "varlen") and any(not call.relative for call in masked)
        lines = [f"attention of documents: {attention}, for which the host waits once in each forward"] if waits else []
        return CUDA | attention_kernels(attention) | _fused_rotary(device, dtype)[0], lines
    table, lines = dict(CUDA), []
    # crops of several sizes by xformers, as DINOv2 has it; documents and windows by FlexAttention, which alone builds
    # its masks without waiting for the device
    for name, kinds, own, what in (
        ("xformers", [PackedAttention], packed, "crops of several sizes"),
        ("flex", [Masks, RelativeBias, MaskedAttention], masked, "documents and windows"),
    ):
        if not own:
            continue
        reason = unusable(name, device, dtype, own)
        table |= {} if reason else {kind: attention_kernels(name)[kind] for kind in kinds}
        lines.append(f"attention of {what}: {name if not reason else f'sdpa, as {name} {reason}'}")
    fused, reason = _fused_rotary(device, dtype)
    return table | fused, [*lines, *([f"rotary positions by plain operations: {reason}"] if reason else [])]


def _fused_rotary(device: torch.device, dtype: torch.dtype) -> tuple[Table, str]:
    if reason := unusable("rotary", device, dtype, ()):
        return {}, reason
    from pretrain.kernels import rotary

    return {Rotary: rotary.CompiledRotary}, ""


@functools.cache
def unusable(name: str, device: torch.device, dtype: torch.dtype, calls: tuple[Call, ...]) -> str:
    """Why a kernel cannot be used here, or "". It computes each of the model's calls on a small example, forward and
    backward, and is compared with its plain module."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"needs a CUDA device, and this run computes on {'cpu' if device.type == 'cuda' else device.type}"
    try:
        difference = _trial(name, device, dtype, calls)
    except ImportError as error:
        if error.name == "xformers":
            return "is not installed (pip install 'unlabeled[xformers]')"
        return f"cannot be imported ({error})"
    except (RuntimeError, NotImplementedError, ValueError, AssertionError) as error:
        kind, words = str(dtype).removeprefix("torch."), str(error).strip() or type(error).__name__
        return f"cannot be used here with {kind} ({words.splitlines()[0][:200]})"
    return "" if difference <= MAX_DIFFERENCE else f"is off by {difference:.2g} from plain operations here"


def _trial(name: str, device: torch.device, dtype: torch.dtype, calls: tuple[Call, ...]) -> float:
    """The largest difference between a kernel and its plain module on small examples, outputs and gradients."""
    if name == "rotary":
        from pretrain.kernels import rotary

        return rotary.trial(device, dtype)
    return trial.difference(attention_kernels(name), calls, device, dtype)
