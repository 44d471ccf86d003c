"""Vision transformer on clips, with sin-cos or rotary positions in time, row and column, and dropped tokens: the
encoder of VideoMAE (arXiv 2203.12602) and of V-JEPA 2 (2506.09985).

Token order: time, row, column; there is no class token. Shapes: B clips of F frames, N = t·h·w tokens, K kept tokens,
D features, d the width of an attention head, T tokens of all inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.families import VideoViT
from pretrain.models.layers import Backbone, Block, Features, LayerNorm, Rotation, Shapes
from pretrain.models.positions import Tables, clip_rotation, clip_table, sequence_table
from pretrain.ops.init import trunc_normal
from pretrain.ops.patchify import pick, tubelets
from pretrain.ops.precision import wide

Grid = tuple[int, int, int]


class AdjacentRotary(nn.Module):
    """Rotary positions whose pairs are adjacent features (2i, 2i + 1): x · cos + (−x[2i + 1], x[2i]) · sin, with cos
    and sin for each feature, [T, 1, d]. Computed in fp32 or wider."""

    def forward(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return self.turned(q, *rotation), self.turned(k, *rotation)

    @staticmethod
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs = wide(x).unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        return (wide(x) * cos + turned * sin).to(x.dtype)


def rotary_block(dim: int, heads: int, **options: Any) -> Block:
    """A transformer block whose queries and keys are rotated as in V-JEPA 2, by a `clip_rotation`."""
    block = Block(dim, heads, **options)
    block.attn.rotary = AdjacentRotary()
    return block


def rotation_at(rotation: Rotation, index: Tensor) -> Rotation:
    """The rotation [B·K, 1, d] of the tokens `index` [B, K], from that of all tokens [N, 1, d]."""
    cos, sin = (table[index].flatten(0, 1) for table in rotation)
    return cos, sin


def _check(cfg: VideoViT) -> None:
    for whole, part in (("dim", "heads"), ("image_size", "patch_size"), ("frames", "tubelet")):
        size, unit = getattr(cfg, whole), getattr(cfg, part)
        if size % unit:
            fitting = max(1, round(size / unit)) * unit
            raise ValueError(
                f"model.{whole} = {size} must be a multiple of model.{part} = {unit}; write model.{whole}={fitting}"
            )


class VideoTransformer(Backbone):
    """x: float [B, F, C, H, W]. See `Backbone`; it takes no mask."""

    whole_patches = True

    def __init__(self, cfg: VideoViT):
        super().__init__()
        _check(cfg)
        self.cfg = cfg
        self.embed_dim, self.image_size, self.patch_size = cfg.dim, cfg.image_size, cfg.patch_size
        self.patch_embed = nn.Linear(cfg.tubelet * cfg.patch_size**2 * cfg.in_channels, cfg.dim)
        options: dict[str, Any] = {
            "mlp_ratio": cfg.mlp_ratio,
            "qkv_bias": cfg.qkv_bias,
            "key_bias": cfg.key_bias,
            "drop_path": cfg.drop_path,
            "norm_eps": cfg.norm_eps,
        }
        make = rotary_block if cfg.positions == "rope" else Block
        self.blocks = nn.ModuleList(make(cfg.dim, cfg.heads, **options) for _ in range(cfg.depth))
        self.norm = LayerNorm(cfg.dim, cfg.norm_eps)
        self._tables = Tables()  # by grid and device
        self._positions(self.full_grid, torch.device("cpu"))  # raises ValueError for a width that does not fit
        self.apply(partial(trunc_normal, std=cfg.initial_std))

    @property
    def full_grid(self) -> Grid:
        """The grid (t, h, w) of the clips that the config states."""
        side = self.cfg.image_size // self.cfg.patch_size
        return self.cfg.frames // self.cfg.tubelet, side, side

    def about(self) -> dict[str, Any]:
        return super().about() | {"frames": self.cfg.frames, "tubelet": self.cfg.tubelet}

    def example(self) -> Tensor:
        """Two random clips."""
        size = (2, self.cfg.frames, self.cfg.in_channels, self.cfg.image_size, self.cfg.image_size)
        return torch.randn(size, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor | list[Tensor], *, mask=None, keep=None, layers: int = 1):
        """See `Backbone`. `keep` is a list (None where an input has none) when x is a list."""
        if not isinstance(x, list):
            return self.forward([x], mask=[mask], keep=[keep], layers=layers)[0]
        if mask is not None and any(one is not None for one in mask):
            raise ValueError("a model of clips has no mask token, so it takes no mask; give it `keep`")
        embedded = [self._embed(*inputs) for inputs in zip(x, keep or [None] * len(x), strict=True)]
        shapes: Shapes = [(tokens.shape[0], tokens.shape[1]) for tokens, _, _ in embedded]
        flat = torch.cat([tokens.flatten(0, 1) for tokens, _, _ in embedded])  # [T, D]
        rotations = [rotation for _, _, rotation in embedded if rotation is not None]
        rotation = (torch.cat([r[0] for r in rotations]), torch.cat([r[1] for r in rotations])) if rotations else None
        outputs = []
        for i, block in enumerate(self.blocks):
            flat = block(flat, shapes, rotation)
            if i >= len(self.blocks) - layers:
                outputs.append(self.norm(flat))
        pieces = torch.cat(outputs, dim=-1).split([b * n for b, n in shapes])
        found = []
        for piece, shape, (_, grid, _) in zip(pieces, shapes, embedded, strict=True):
            tokens = piece.view(*shape, -1)
            found.append(Features(tokens.mean(1), tokens, tokens[:, :0], grid))
        return found

    def _embed(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Grid, Rotation | None]:
        """(tokens [B, N or K, D], the grid of the clip, cos and sin of these tokens [B·N or B·K, 1, d])."""
        cfg, size = self.cfg, x.shape
        if size[1] % cfg.tubelet or size[3] % cfg.patch_size or size[4] % cfg.patch_size:
            raise ValueError(
                f"a clip of {size[1]} frames of {size[3]}×{size[4]} pixels does not divide into tokens of"
                f" {cfg.tubelet} frames and {cfg.patch_size}×{cfg.patch_size} pixels"
            )
        grid = (size[1] // cfg.tubelet, size[3] // cfg.patch_size, size[4] // cfg.patch_size)
        tokens = self.patch_embed(tubelets(x, cfg.tubelet, cfg.patch_size))  # [B, N, D]
        positions = self._positions(grid, x.device)
        if isinstance(positions, Tensor):
            tokens = tokens + positions.to(tokens.dtype)
        if keep is not None:
            tokens = pick(tokens, keep)
        if isinstance(positions, Tensor):
            return tokens, grid, None
        if keep is None:
            keep = torch.arange(tokens.shape[1], device=x.device).expand(len(x), -1)
        return tokens, grid, rotation_at(positions, keep)

    def _positions(self, grid: Grid, device: torch.device) -> Tensor | Rotation:
        """The table [N, D] that is added to the tokens, or the rotation [N, 1, d] of queries and keys."""
        cfg = self.cfg
        if cfg.positions == "sequence" and grid != self.full_grid:
            raise ValueError(
                f"model.positions = sequence is for clips of {cfg.frames} frames of {cfg.image_size} pixels, not for a"
                f" grid of {grid[0]}×{grid[1]}×{grid[2]} tokens; write model.positions=sincos for several sizes"
            )

        def make() -> Tensor | Rotation:
            if cfg.positions == "rope":
                return clip_rotation(cfg.dim // cfg.heads, grid, device)
            if cfg.positions == "sincos":
                return clip_table(cfg.dim, grid, device)
            return sequence_table(cfg.dim, grid[0] * grid[1] * grid[2], device)

        return self._tables.of((grid, device), make)
