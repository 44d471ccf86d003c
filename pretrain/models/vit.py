"""Vision transformer (arXiv 2010.11929) with learned, sin-cos or rotary positions, registers (2309.16588), masks, and
dropped patches.

Token order: class token, registers, patches row-major. With `pooling: attention` there is no class token. Shapes: B
images, N patches, K kept patches, R registers, D features, d the width of an attention head, P = 1 + R (without a class
token R), L blocks, T tokens of all inputs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from pretrain.models.families import ViT
from pretrain.models.layers import AttentionPool, Backbone, Block, Features, LayerNorm, Rotation, Shapes
from pretrain.models.positions import Tables, interpolate_table, rope_angles, rope_change, rope_periods, sincos_table
from pretrain.ops.host_to_device import to_device
from pretrain.ops.init import trunc_normal
from pretrain.ops.patchify import pick


def _check(cfg: ViT) -> None:
    for whole, part in (("dim", "heads"), ("image_size", "patch_size")):
        size, unit = getattr(cfg, whole), getattr(cfg, part)
        if size % unit:
            fitting = max(1, round(size / unit)) * unit
            raise ValueError(
                f"model.{whole} = {size} must be a multiple of model.{part} = {unit}; write model.{whole}={fitting}"
            )
    if cfg.mlp == "swiglu" and cfg.pooling == "attention":
        raise ValueError(
            "model.mlp = swiglu: the head of model.pooling = attention has no such MLP; write model.mlp=gelu"
        )
    if cfg.local_cls_norm and cfg.pooling == "attention":
        raise ValueError("model.local_cls_norm = true: needs the class token of model.pooling = token")
    if cfg.positions != "rope":
        return
    for key, least in (("rope_shift", 0), ("rope_jitter", 1), ("rope_rescale", 1)):
        value = getattr(cfg, key)
        if value is not None and value < least:
            raise ValueError(f"model.{key} = {value}: must be {least} or more, or null")


class VisionTransformer(Backbone):
    whole_patches = True
    training_only = ("local_cls_norm",)
    last_layer_parts = ("norm", "local_cls_norm", "attention_pool")

    def __init__(self, cfg: ViT):
        super().__init__()
        _check(cfg)
        self.cfg = cfg
        self.embed_dim, self.image_size, self.patch_size = cfg.dim, cfg.image_size, cfg.patch_size
        has_class_token = cfg.pooling == "token"
        self.prefix, self.max_layers = int(has_class_token) + cfg.registers, cfg.depth
        side = cfg.image_size // cfg.patch_size
        self.patch_embed = nn.Conv2d(cfg.in_channels, cfg.dim, cfg.patch_size, cfg.patch_size, bias=cfg.patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.dim)) if has_class_token else None
        self.registers = nn.Parameter(torch.zeros(1, cfg.registers, cfg.dim)) if cfg.registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, cfg.dim)) if cfg.mask_token else None
        if cfg.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, has_class_token + side * side, cfg.dim))
        elif cfg.positions == "sincos":
            table = torch.cat([torch.zeros(int(has_class_token), cfg.dim), sincos_table(cfg.dim, (side, side))])
            self.register_buffer("pos_embed", table.unsqueeze(0))
        else:  # the periods are no buffer, which would be rounded to bf16 with the weights and change features by 1e-3
            rope_periods(cfg.dim // cfg.heads, cfg.rope_base)
        options = (cfg.mlp_ratio, cfg.mlp, cfg.qkv_bias, cfg.layer_scale, cfg.drop_path, cfg.norm_eps, cfg.key_bias)
        self.embed_norm = LayerNorm(cfg.dim, cfg.norm_eps) if cfg.embed_norm else None
        self.blocks = nn.ModuleList(Block(cfg.dim, cfg.heads, *options) for _ in range(cfg.depth))
        self.norm = LayerNorm(cfg.dim, cfg.norm_eps)
        self.local_cls_norm = LayerNorm(cfg.dim, cfg.norm_eps) if cfg.local_cls_norm else None
        hidden = int(cfg.dim * cfg.mlp_ratio + 1e-6)
        pool = None if has_class_token else AttentionPool(cfg.dim, cfg.heads, hidden, cfg.mlp, cfg.norm_eps)
        self.attention_pool = pool
        self._rotations, self._periods = Tables(), Tables()  # by grid and device; by device
        self._initialise()

    def _initialise(self) -> None:
        self.apply(partial(trunc_normal, std=self.cfg.initial_std))
        bound = (self.cfg.in_channels * self.patch_size**2) ** -0.5
        nn.init.uniform_(self.patch_embed.weight, -bound, bound)
        if self.patch_embed.bias is not None:
            nn.init.zeros_(self.patch_embed.bias)
        query = self.attention_pool.query_token if self.attention_pool is not None else None
        table = self.pos_embed if self.cfg.positions == "learned" else None
        for token in (self.cls_token, self.registers, query, table):
            if token is not None:
                nn.init.normal_(token, std=self.cfg.initial_std)

    def forward(self, x: Tensor | list[Tensor], *, mask=None, keep=None, layers: int = 1):
        """See `Backbone`. `mask` and `keep` are lists (None where an input has none) when x is a list.

        With `local_cls_norm`, all inputs of a list except the first are treated as local crops: in training, their
        class token and registers use that norm instead of the common one.
        """
        if not isinstance(x, list):
            return self.forward([x], mask=[mask], keep=[keep], layers=layers)[0]
        several = [None] * len(x)
        embedded = [self._embed(*inputs) for inputs in zip(x, mask or several, keep or several, strict=True)]
        shapes: Shapes = [(tokens.shape[0], tokens.shape[1]) for tokens, _, _ in embedded]
        flat = torch.cat([tokens.flatten(0, 1) for tokens, _, _ in embedded])  # [T, D]
        outputs = []
        rotations = self._packed_rotations([rotation for _, _, rotation in embedded if rotation], shapes)
        for i, block in enumerate(self.blocks):
            flat = block(flat, shapes, rotations[i] if rotations else None)
            if i >= len(self.blocks) - layers:
                outputs.append(self._normed(flat, shapes))
        return [
            self._features(same, grid) for same, (_, grid, _) in zip(zip(*outputs, strict=True), embedded, strict=True)
        ]

    def _features(self, outputs: tuple[Tensor, ...], grid: tuple[int, int]) -> Features:
        """The features of one input from its tokens [B, P + N, D] after each of the last layers."""
        part = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        if self.attention_pool is None:
            return Features(part[:, 0], part[:, self.prefix :], part[:, 1 : self.prefix], grid)
        pooled = [self.attention_pool(tokens[:, self.prefix :]) for tokens in outputs]
        cls = torch.cat(pooled, dim=-1) if len(pooled) > 1 else pooled[0]
        return Features(cls, part[:, self.prefix :], part[:, : self.prefix], grid)

    def _normed(self, flat: Tensor, shapes: Shapes) -> list[Tensor]:
        """Apply the last norm to the packed tokens [T, D]. Returns [B, P + N, D] for each input."""

        def unpack(x: Tensor) -> list[Tensor]:
            pieces = x.split([b * n for b, n in shapes]) if len(shapes) > 1 else [x]
            return [piece.view(b, n, -1) for piece, (b, n) in zip(pieces, shapes, strict=True)]

        parts = unpack(self.norm(flat))
        if self.local_cls_norm is None or not self.training or len(parts) == 1:
            return parts
        # Class token and registers of local crops, of all sizes in one call: [Σ B·P, D]
        prefixes = torch.cat([part[:, : self.prefix].flatten(0, 1) for part in unpack(flat)[1:]])
        normed = self.local_cls_norm(prefixes).split([b * self.prefix for b, _ in shapes[1:]])
        local = [
            torch.cat([tokens.view(-1, self.prefix, tokens.shape[-1]), part[:, self.prefix :]], dim=1)
            for tokens, part in zip(normed, parts[1:], strict=True)
        ]
        return [parts[0], *local]

    def _embed(
        self, x: Tensor, mask: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, tuple[int, int], Rotation | None]:
        """(tokens [B, P + N or K, D] with positions, patch grid, cos and sin of these tokens for each block).

        The tokens, and so the residual stream, have the dtype of the patch embedding's output.
        """
        if x.shape[-2] % self.patch_size or x.shape[-1] % self.patch_size:
            raise ValueError(
                f"an input of {x.shape[-2]}×{x.shape[-1]} pixels does not divide into patches of {self.patch_size}"
            )
        patches = self.patch_embed(x)  # [B, D, h, w]
        grid = (patches.shape[-2], patches.shape[-1])
        patches = patches.flatten(2).transpose(1, 2)  # [B, N, D]
        if mask is not None:
            if self.mask_token is None:
                raise ValueError("this backbone was built without mask_token, so it takes no mask")
            patches = torch.where(mask.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        cls = self.cls_token
        if self.cfg.positions != "rope":
            # antialias: as in transformers' Dinov2 with and without registers, so that exports agree at every size
            table = self.pos_embed if cls is None else self.pos_embed[:, 1:]
            table = interpolate_table(table, grid, self.cfg.registers > 0, self.cfg.position_offset)
            patches = patches + table.to(patches.dtype)
            cls = None if cls is None else cls + self.pos_embed[:, :1]
        if keep is not None:
            patches = pick(patches, keep)  # [B, K, D]
        prefix = [token.to(patches.dtype) for token in (cls, self.registers) if token is not None]
        tokens = torch.cat([p.expand(x.shape[0], -1, -1) for p in prefix] + [patches], dim=1)
        if self.embed_norm is not None:
            tokens = self.embed_norm(tokens)
        return tokens, grid, self._rotation(grid, keep, x.device) if self.cfg.positions == "rope" else None

    def _rotation(self, grid: tuple[int, int], keep: Tensor | None, device: torch.device) -> Rotation:
        """cos and sin of an input's tokens for each block: [L, P + N, 1, d/2], or [L, B, P + K, 1, d/2] with `keep`; L
        is 1 where all blocks share them. Class token and registers are not rotated (angle 0)."""
        cfg = self.cfg
        options = (cfg.rope_shift, cfg.rope_jitter, cfg.rope_rescale)
        if self.training and any(option is not None for option in options):
            cos, sin = self._tables(grid, device, rope_change(len(self.blocks), *options))
        else:
            cos, sin = self._rotations.of((grid, device), lambda: self._tables(grid, device))
        if keep is not None:
            prefix = torch.arange(self.prefix, device=device).expand(len(keep), -1)
            index = torch.cat([prefix, keep + self.prefix], dim=1)  # [B, P + K]
            cos, sin = cos[:, index], sin[:, index]
        return cos, sin

    def _packed_rotations(self, rotations: list[Rotation], shapes: Shapes) -> list[Rotation]:
        """For each block cos and sin of all packed tokens, [T, 1, d/2], from those of each input."""
        packed = []
        for tables in zip(*rotations, strict=True):  # the inputs' cos, then their sin
            each = [table if table.ndim == 5 else table.unsqueeze(1) for table in tables]  # [L, B or 1, N, 1, d/2]
            each = [t.expand(-1, *shape, -1, -1).flatten(1, 2) for t, shape in zip(each, shapes, strict=True)]
            blocks = torch.cat(each, dim=1).unbind()
            packed.append(blocks if len(blocks) == len(self.blocks) else blocks * len(self.blocks))
        return list(zip(*packed, strict=True))

    def _tables(self, grid: tuple[int, int], device: torch.device, change: Tensor | None = None) -> Rotation:
        """cos and sin [L, P + N, 1, d/2], fp32; L is 1 without `change`."""
        cfg = self.cfg
        periods = self._periods.of(device, lambda: rope_periods(cfg.dim // cfg.heads, cfg.rope_base, device))
        angles = rope_angles(periods, grid, None if change is None else to_device(change, device))
        angles = (angles if change is not None else angles.unsqueeze(0))[..., : angles.shape[-1] // 2]
        angles = torch.cat([angles.new_zeros(len(angles), self.prefix, angles.shape[2]), angles], dim=1).unsqueeze(2)
        return angles.cos(), angles.sin()
