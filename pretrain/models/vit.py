"""Vision transformer (arXiv 2010.11929) with learned, sin-cos or rotary positions, registers (2309.16588), masks, and dropped patches.

Token order: class token, registers, patches row-major. Shapes: B images, N patches, K kept patches, R registers, D features, P = 1 + R.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.layers import Backbone, Block, Features, Rotation, Shapes, trunc_normal
from pretrain.models.positions import interpolate_table, rope_angles, rope_periods, sincos_table
from pretrain.models.presets import ViT


class VisionTransformer(Backbone):
    def __init__(self, cfg: ViT):
        super().__init__()
        if cfg.dim % cfg.heads or cfg.image_size % cfg.patch_size:
            raise ValueError(
                f"model.dim = {cfg.dim} must be a multiple of model.heads = {cfg.heads},"
                f" and model.image_size = {cfg.image_size} of model.patch_size = {cfg.patch_size}"
            )
        self.cfg = cfg
        self.embed_dim, self.image_size, self.patch_size = cfg.dim, cfg.image_size, cfg.patch_size
        side = cfg.image_size // cfg.patch_size
        self.patch_embed = nn.Conv2d(cfg.in_channels, cfg.dim, cfg.patch_size, stride=cfg.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.registers = nn.Parameter(torch.zeros(1, cfg.registers, cfg.dim)) if cfg.registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, cfg.dim)) if cfg.mask_token else None
        if cfg.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, cfg.dim))
        elif cfg.positions == "sincos":
            table = torch.cat([torch.zeros(1, cfg.dim), sincos_table(cfg.dim, (side, side))])
            self.register_buffer("pos_embed", table.unsqueeze(0))
        else:
            self.register_buffer("periods", rope_periods(cfg.dim // cfg.heads, cfg.rope_base))
        self.blocks = nn.ModuleList(
            Block(
                cfg.dim, cfg.heads, cfg.mlp_ratio, cfg.mlp, cfg.qkv_bias, cfg.layer_scale, cfg.drop_path, cfg.norm_eps
            )
            for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.dim, cfg.norm_eps)
        self._rotations: dict[tuple, Rotation] = {}
        self._initialise()

    def _initialise(self) -> None:
        self.apply(trunc_normal)
        bound = (self.cfg.in_channels * self.patch_size**2) ** -0.5
        nn.init.uniform_(self.patch_embed.weight, -bound, bound)
        nn.init.zeros_(self.patch_embed.bias)
        for token in (self.cls_token, self.registers, self.pos_embed if self.cfg.positions == "learned" else None):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def shard_units(self) -> list[nn.Module]:
        return [*self.blocks, self]

    def forward(self, x: Tensor | list[Tensor], *, mask=None, keep=None, layers: int = 1):
        """See `Backbone`. `mask` and `keep` are lists (None where an input has none) when x is a list."""
        if not isinstance(x, list):
            return self.forward([x], mask=[mask], keep=[keep], layers=layers)[0]
        several = [None] * len(x)
        embedded = [self._embed(*inputs) for inputs in zip(x, mask or several, keep or several, strict=True)]
        shapes: Shapes = [(tokens.shape[0], tokens.shape[1]) for tokens, _, _ in embedded]
        flat = torch.cat([tokens.flatten(0, 1) for tokens, _, _ in embedded])  # [T, D]
        rotations = [rotation for _, _, rotation in embedded] if self.cfg.positions == "rope" else None
        outputs = []
        for i, block in enumerate(self.blocks):
            flat = block(flat, shapes, rotations)
            if i >= len(self.blocks) - layers:
                outputs.append(self.norm(flat))
        flat = torch.cat(outputs, dim=-1) if layers > 1 else outputs[0]
        parts = [
            part.view(b, n, -1) for part, (b, n) in zip(flat.split([b * n for b, n in shapes]), shapes, strict=True)
        ]
        prefix = 1 + self.cfg.registers
        return [
            Features(part[:, 0], part[:, prefix:], part[:, 1:prefix], grid)
            for part, (_, grid, _) in zip(parts, embedded, strict=True)
        ]

    def _embed(
        self, x: Tensor, mask: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, tuple[int, int], Rotation | None]:
        """([B, P + N or K, D] with positions, the patch grid, rotary angles of those tokens)."""
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
            # as transformers has it for Dinov2 with and without registers, so that exports agree at every size
            table = interpolate_table(self.pos_embed[:, 1:], grid, antialias=self.cfg.registers > 0)
            patches = patches + table
            cls = cls + self.pos_embed[:, :1]
        if keep is not None:
            patches = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, self.embed_dim))  # [B, K, D]
        prefix = [cls.to(patches.dtype)] + ([self.registers.to(patches.dtype)] if self.registers is not None else [])
        tokens = torch.cat([p.expand(len(x), -1, -1) for p in prefix] + [patches], dim=1)
        return tokens, grid, self._rotation(grid, keep) if self.cfg.positions == "rope" else None

    def _rotation(self, grid: tuple[int, int], keep: Tensor | None) -> Rotation:
        """cos and sin for every token; class token and registers are not rotated (angle 0)."""
        key = (grid, self.periods.device)
        if key not in self._rotations:
            with torch.inference_mode(False):  # training may need them later
                angles = rope_angles(self.periods.float(), grid)
                angles = torch.cat([angles.new_zeros(1 + self.cfg.registers, angles.shape[1]), angles])  # [P + N, d]
                self._rotations[key] = (angles.cos(), angles.sin())
        if keep is None:
            return self._rotations[key]
        prefix = torch.arange(1 + self.cfg.registers, device=keep.device).expand(len(keep), -1)
        index = torch.cat([prefix, keep + 1 + self.cfg.registers], dim=1)  # [B, P + K]
        cos, sin = (table[index].unsqueeze(1) for table in self._rotations[key])  # [B, 1, P + K, d]
        return cos, sin
