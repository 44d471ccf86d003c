"""Any image network of timm, to be trained or distilled: `cls` holds its pooled features, `tokens` its features before
pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.models.families import Timm
from pretrain.models.layers import Backbone, Features
from pretrain.ops.sync_norm import BatchNorm


class BatchNormAct(BatchNorm):
    """timm's BatchNormAct2d, a batch norm that is followed by dropout and an activation, over the samples of all
    ranks."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class TimmNetwork(Backbone):
    """A network that timm builds and initialises. Its batch norms are replaced by ours, which normalise over the samples
    of all ranks. `optim.layer_decay` and `optim.patch_embed_lr` have no effect on it, because timm does not say which
    layer a parameter belongs to."""

    def __init__(self, cfg: Timm):
        super().__init__()
        self.cfg = cfg
        self.network: Any = create(cfg)
        synchronise(self.network)
        self.embed_dim, self.image_size = self.network.num_features, cfg.image_size
        embed: Any = getattr(self.network, "patch_embed", None)
        is_vit = embed is not None and hasattr(self.network, "num_prefix_tokens")
        self.whole_patches = is_vit
        self.patch_size = embed.patch_size[0] if is_vit else _stride(self.network)
        self.channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"

    def shard_units(self) -> list[nn.Module]:
        return [self]

    def layer_of(self, name: str) -> tuple[int, int]:
        return 1, 1

    def forward(self, x: Tensor | list[Tensor], *, mask=None, keep=None, layers: int = 1):
        """See `Backbone`; takes no mask, drops no patches, and has one layer of features."""
        given = [*mask, *(keep or [])] if isinstance(mask, list) else [mask, keep]
        if any(each is not None for each in given) or layers != 1:
            raise ValueError(
                "a network of timm takes no mask, no keep and layers=1 only; choose a ViT (model=vit_small)"
            )
        if isinstance(x, list):
            return [self.forward(one) for one in x]
        maps = self.network.forward_features(x)
        if maps.ndim == 4:
            cls = self.network.forward_head(maps, pre_logits=True)
            maps = maps.permute(0, 3, 1, 2) if self.channels_last else maps  # [B, D, h, w]
            grid, tokens, prefix = tuple(maps.shape[-2:]), maps.flatten(2).transpose(1, 2), 0
        else:
            prefix = self.network.num_prefix_tokens
            grid, tokens = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size), maps[:, prefix:]
            cls = self.network.forward_head(maps, pre_logits=True)
        if cls.shape[-1] != tokens.shape[-1]:  # the head changes the width: use the mean of the tokens instead
            cls = tokens.mean(1)
        return Features(cls, tokens, maps[:, 1:prefix] if prefix > 1 else tokens[:, :0], grid)


def create(cfg: Timm, folder: str = "") -> nn.Module:
    """timm's model without a classifier, with the weights of a timm folder if one is named; ViTs take any input size.

    Raises ValueError if timm is not installed or does not know the architecture.
    """
    try:
        import timm
    except ImportError:
        raise ValueError("model.name = timm: is not installed; pip install timm") from None
    if not timm.is_model(cfg.architecture):
        raise ValueError(
            f"model.architecture = {cfg.architecture!r}: timm has no such model; timm.list_models('*') lists them"
        )
    name = f"local-dir:{folder}" if folder else cfg.architecture
    common = {"pretrained": bool(folder), "num_classes": 0, "in_chans": cfg.in_channels}
    try:
        return timm.create_model(name, img_size=cfg.image_size, dynamic_img_size=True, **common)
    except TypeError:  # no ViT
        return timm.create_model(name, **common)


def synchronise(network: nn.Module) -> None:
    """Replace the classes of the batch norms in a network of timm by ours. Parameters, buffers and their names do not
    change. Raises ValueError for batch norms that ours cannot replace."""
    from timm.layers import BatchNormAct2d

    ours = {nn.BatchNorm1d: BatchNorm, nn.BatchNorm2d: BatchNorm, BatchNormAct2d: BatchNormAct}
    for name, module in network.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if type(module) not in ours or module.running_mean is None or module.momentum is None:
            raise ValueError(
                f"model.architecture: {name} is a {type(module).__name__} whose statistics cannot be those of all ranks;"
                " choose an architecture without it"
            )
        module.__class__ = ours[type(module)]


def _stride(network: Any) -> int:
    """The number of pixels along one side of a cell of the network's last feature map."""
    return network.feature_info[-1]["reduction"]
