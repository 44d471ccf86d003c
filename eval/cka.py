"""Similarity of the representations of two models: linear centred kernel alignment (CKA; Kornblith et al., arXiv
1905.00414), with the unbiased estimator of HSIC (Song et al., 2012; Nguyen et al., 2010.15327), so that features of two
unrelated models have a similarity of about 0 for any number of samples. It is invariant to rotations and to the scale of
features, and models may have different numbers of them. Shapes: N samples, D and E features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from common.errors import DataError
from eval.feature_rows import CHUNK, Rows, chunks, statistics

MIN_SAMPLES = 4


def cka(x: Rows, y: Rows, device: torch.device | str = "cpu") -> float:
    """CKA of features [N, D] and [N, E] of the same samples; 1 for equal ones, also after a rotation. They are read in
    parts: memory is that of a D × E matrix. Raises DataError for fewer than four samples."""
    if len(x) != len(y):
        raise ValueError(f"features of {len(x)} and of {len(y)} samples")
    if len(x) < MIN_SAMPLES:
        raise DataError(f"{len(x)} samples: CKA needs {MIN_SAMPLES} or more")
    of_both, of_x, of_y = (_hsic(a, b, device) for a, b in ((x, y), (x, x), (y, y)))
    return of_both / max((of_x * of_y) ** 0.5, 1e-300) if of_x > 0 and of_y > 0 else 0.0


def _hsic(x: Rows, y: Rows, device: torch.device | str) -> float:
    """The unbiased estimate of HSIC with linear kernels K = X Xᵀ and L = Y Yᵀ, whose diagonals count as 0, from sums
    over samples instead of matrices [N, N]."""
    count = len(x)
    means = [statistics(each, device)[0].double() for each in (x, y)]
    cross = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=device)
    sums = [torch.zeros(each.shape[1], dtype=torch.float64, device=device) for each in (x, y)]
    for a, b in _pairs(x, y, means, device):
        cross += a.T @ b
        sums = [total + part.sum(0) for total, part in zip(sums, (a, b), strict=True)]
    diagonal = torch.zeros((), dtype=torch.float64, device=device)  # Σᵢ Kᵢᵢ Lᵢᵢ
    totals = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)]  # 1ᵀ K 1 and 1ᵀ L 1
    product = torch.zeros((), dtype=torch.float64, device=device)  # 1ᵀ K L 1
    for a, b in _pairs(x, y, means, device):
        norms = [part.square().sum(1) for part in (a, b)]
        rows = [part @ total - norm for part, total, norm in zip((a, b), sums, norms, strict=True)]
        diagonal += norms[0] @ norms[1]
        product += rows[0] @ rows[1]
        totals = [total + row.sum() for total, row in zip(totals, rows, strict=True)]
    trace = cross.square().sum() - diagonal
    value = trace + totals[0] * totals[1] / ((count - 1) * (count - 2)) - 2 * product / (count - 2)
    return float(value) / (count * (count - 3))


def _pairs(x: Rows, y: Rows, means: list[Tensor], device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of both features minus their means, fp64; the estimate does not depend on means, but its rounding does."""
    parts = (chunks(each, CHUNK, device) for each in (x, y))
    for (_, a), (_, b) in zip(*parts, strict=True):
        yield a.double() - means[0], b.double() - means[1]
