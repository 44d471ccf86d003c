"""Operations on views that run on the device: normalisation, and the fused colour operations of
`data_pipeline/views/colors.py`.

`apply` runs these operations for a whole batch at once:

    x → own · R(x) + luma · L(x) + mean · m    brightness, contrast, saturation, hue and grey: see `color_row`
      → Gaussian blur of 9 taps, mirrored at the edges, with each view's own sigma
      → min(x, 255 − x)                        where the view is solarized

This is what happens to uint8. uint16 has 65,535 instead of 255, and float32 is not solarized, cut off or rounded. The
result of each line is rounded to whole levels, as in the data workers; where a GPU may round the inputs of products
to TF32 (`pretrain.parallel.device.set_tf32`: in all runs but those in fp32), a level of uint8 may differ by one. TF32 has
11 bits, which hold all numbers of uint8 but not those of uint16 and float32, so that these are not multiplied as
matrices. No shape and no branch depends on values, and `constants` are copied to the device once, so there is no host
sync.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.formats.pixels import LUMA, top_level
from data_pipeline.views.colors import BASIS

RADIUS = 4  # of the blur, in pixels


class Constants(NamedTuple):
    """The numbers that these operations need, float32 on one device."""

    mean: Tensor  # [C, 1, 1], of each channel, for the levels of the dtype: from 0 to 255 for uint8
    std: Tensor  # [C, 1, 1]
    basis: Tensor  # [4, 3, 3]: the colour matrix of each of the coefficients own, own · cos, own · sin, luma
    luma: Tensor  # [3]


def constants(
    mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype = torch.uint8
) -> Constants:
    """The constants on a device for images of `dtype`: uint8, uint16 or float32. `mean` and `std` of each channel are
    for pixels from 0 to 1, and for float32 in its own unit. Call it once and keep the result, because it copies from the
    host."""
    top = top_level(dtype)
    offset, scale = (torch.tensor(values, device=device).view(-1, 1, 1) * top for values in (mean, std))
    basis = torch.from_numpy(BASIS).float().to(device).unflatten(1, (3, 4))[:4, :, :3]
    return Constants(offset, scale, basis, torch.tensor(LUMA, device=device))


def apply(images: Tensor, rows: Tensor, constants: Constants) -> Tensor:
    """Images [..., C, H, W] of uint8, uint16 or float32, with the parameters `rows` [..., 6] of `colors.color_row` for
    each view → the same shape and dtype. H and W are 5 or more.
    """
    if not images.numel():
        return images
    flat = images.reshape(-1, *images.shape[-3:])  # [N, C, H, W]
    own, luma, mean, angle, sigma, solarize = rows.reshape(-1, rows.shape[-1]).float().unbind(1)  # [N]
    mix = _mix if images.dtype == torch.uint8 else _mix_in_fp32
    x = mix(flat.float(), own, luma, mean, angle, constants)
    if images.dtype == torch.float32:
        return _blur(x, sigma).reshape(images.shape)
    top = top_level(images.dtype)
    x = _blur(x.clamp_(0, top).round_(), sigma).round_()
    x = torch.where(solarize[:, None, None, None] > 0, torch.minimum(x, top - x), x)
    return x.to(images.dtype).reshape(images.shape)


def normalize(images: Tensor, constants: Constants) -> Tensor:
    """Images [..., C, H, W] of the dtype of the constants → float32 (x / 255 − mean) / std, where 255 is `top_level` of
    the dtype. Operates in place on one float32 copy, which saves the memory of two."""
    return images.to(torch.float32, copy=True).sub_(constants.mean).div_(constants.std)


def _mix(x: Tensor, own: Tensor, luma: Tensor, mean: Tensor, angle: Tensor, constants: Constants) -> Tensor:
    """x → own · R(x) + luma · L(x) + mean · m, with one colour matrix per view. x: [N, C, H, W], the others: [N]."""
    if x.shape[1] != 3:
        return own[:, None, None, None] * x + (mean * x.mean((1, 2, 3)))[:, None, None, None]
    coefficients = torch.stack([own, own * angle.cos(), own * angle.sin(), luma], dim=1)  # [N, 4]
    matrix = torch.einsum("nk,kij->nij", coefficients, constants.basis)  # [N, 3, 3]
    constant = mean * (x.mean((2, 3)) @ constants.luma)  # [N]
    return torch.baddbmm(constant[:, None, None], matrix, x.flatten(2)).unflatten(2, x.shape[2:])


def _mix_in_fp32(x: Tensor, own: Tensor, luma: Tensor, mean: Tensor, angle: Tensor, constants: Constants) -> Tensor:
    """`_mix` without matrix products, so that no input is rounded to TF32."""
    if x.shape[1] != 3:
        return _mix(x, own, luma, mean, angle, constants)
    coefficients = torch.stack([own, own * angle.cos(), own * angle.sin(), luma], dim=1)  # [N, 4]
    matrix = (coefficients[:, :, None, None] * constants.basis).sum(1)[..., None, None]  # [N, 3, 3, 1, 1]
    out = (mean * (x.mean((2, 3)) * constants.luma).sum(1))[:, None, None, None]  # [N, 1, 1, 1]
    for channel in range(3):
        out = torch.addcmul(out, matrix[:, :, channel], x[:, channel : channel + 1])
    return out  # [N, 3, H, W]


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur [N, C, H, W] with one sigma per view [N]. A sigma of 0 does not change a view."""
    taps = torch.arange(-RADIUS, RADIUS + 1, device=x.device)
    # A sigma of 0 becomes 0.01, for which all taps except the middle one are 0.
    weights = torch.exp(-(taps**2) / (2 * sigma.clamp_min(0.01)[:, None] ** 2))
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)  # [N·C, 9]
    planes = F.pad(x, [RADIUS] * 4, mode="reflect").flatten(0, 1)[None]  # [1, N·C, H + 8, W + 8]
    planes = F.conv2d(planes, weights[:, None, :, None], groups=len(weights))
    return F.conv2d(planes, weights[:, None, None, :], groups=len(weights)).reshape(x.shape)
