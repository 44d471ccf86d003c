"""Kernels: classes with the same results as a plain module of the models, but faster on one kind of device.

`apply` is called once, when the engine is built; no other code chooses by device. A kernel is a subclass of the plain
module with another `forward`. It replaces the class of the existing instance, so that parameters, buffers and their
names do not change, and checkpoints and exports do not depend on kernels. `tests/test_kernels.py` compares values and
gradients of each kernel with those of its plain module.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from common.errors import ConfigError
from pretrain.kernels import batch_norm, kernel_checks, norms
from pretrain.kernels.kernel_checks import Call, calls_of
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
MAX_DIFFERENCE = 0.05  # from the plain module, relative to it; bf16 rounds to 0.004


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
    """Replace the plain modules of `objective` that have a kernel for `device`. Returns lines for the log, about
    kernels that had to be tried or that make the host wait.

    `attention`: the recipe's `parallel.attention`. `dtype`: that of the computation. Raises ConfigError if the
    attention that is named cannot be used here.
    """
    table, lines = kernels_of(device, attention, dtype, calls_of(objective))
    replace(objective, table)
    return lines


def replace(module: nn.Module, table: Table) -> None:
    """Replace the plain modules in `module` by the kernels of a table."""
    for each in module.modules():
        kernel = table.get(type(each))
        if kernel is not None:
            each.__class__ = kernel


def kernels_of(
    device: torch.device, attention: str, dtype: torch.dtype, calls: tuple[Call, ...]
) -> tuple[Table, list[str]]:
    """(kernels for a device, lines for the log). `calls`: the kinds of attention that the model uses. With "auto",
    plain modules whose kernels cannot be used here are kept."""
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
    # Crops of several sizes use xformers, as in DINOv2. Documents and windows use FlexAttention, because only it builds
    # its masks without a host sync.
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
    """The reason why a kernel cannot be used here, or "". The kernel is tried on a small example of each of the model's
    calls, forward and backward, and compared with its plain module."""
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
    return kernel_checks.difference(attention_kernels(name), calls, device, dtype)
