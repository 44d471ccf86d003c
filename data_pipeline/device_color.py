"""What is done with views on the device: normalisation, and the fused colour operations of `data_pipeline/views.py` where they are left to it.

`apply` does them for a whole batch at once:

    x → own · R(x) + luma · L(x) + mean · m    brightness, contrast, saturation, hue and grey: see `color_row`
      → Gaussian blur of 9 taps, mirrored at the edges, with each view's own sigma
      → min(x, 255 − x)                        where the view is solarized

Rounded to whole levels after each line, as the workers do. No shape and no branch depends on the values, so nothing waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.views import BASIS, LUMA

RADIUS = 4  # of the blur, in pixels


def apply(images: Tensor, rows: Tensor) -> Tensor:
    """uint8 [..., C, H, W] with each view's operations [..., 6] as `color_row` gives them → uint8 [..., C, H, W]. H and W are 5 or more."""
    if not images.numel():
        return images
    flat = images.reshape(-1, *images.shape[-3:])  # [N, C, H, W]
    own, luma, mean, angle, sigma, solarize = rows.reshape(-1, rows.shape[-1]).float().unbind(1)  # [N]
    x = _mix(flat.float(), own, luma, mean, angle)
    x = _blur(x.clamp_(0, 255).round_(), sigma).round_()
    x = torch.where(solarize[:, None, None, None] > 0, torch.minimum(x, 255 - x), x)
    return x.to(torch.uint8).reshape(images.shape)


def normalize(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 [..., C, H, W] → float32 (x / 255 − mean) / std, in place after the first copy: on a CPU, that is the memory of three."""
    offset, scale = (torch.tensor(values, device=images.device).view(-1, 1, 1) * 255 for values in (mean, std))
    return images.float().sub_(offset).div_(scale)


def _mix(x: Tensor, own: Tensor, luma: Tensor, mean: Tensor, angle: Tensor) -> Tensor:
    """One colour matrix per view, and its share of the view's mean luma; x is [N, C, H, W], the others [N]."""
    if x.shape[1] != 3:
        return own[:, None, None, None] * x + (mean * x.mean((1, 2, 3)))[:, None, None, None]
    basis = torch.from_numpy(BASIS).to(x).unflatten(1, (3, 4))[:4, :, :3]
    parts = torch.stack([own, own * angle.cos(), own * angle.sin(), luma], dim=1)
    matrix = torch.einsum("nk,kij->nij", parts, basis)
    constant = mean * (x.mean((2, 3)) @ x.new_tensor(LUMA))  # [N]
    return torch.baddbmm(constant[:, None, None], matrix, x.flatten(2)).unflatten(2, x.shape[2:])


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """[N, C, H, W] with each view's own sigma [N]; 0 leaves a view as it is."""
    taps = torch.arange(-RADIUS, RADIUS + 1, device=x.device)
    weights = torch.exp(-(taps**2) / (2 * sigma.clamp_min(0.01)[:, None] ** 2))  # of 0.01, all but the middle one are 0
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)  # [N·C, 9]
    planes = F.pad(x, [RADIUS] * 4, mode="reflect").flatten(0, 1)[None]  # [1, N·C, H + 8, W + 8]
    planes = F.conv2d(planes, weights[:, None, :, None], groups=len(weights))
    return F.conv2d(planes, weights[:, None, None, :], groups=len(weights)).reshape(x.shape)
