"""The codebook of a VQ-VAE (arXiv 1711.00937): nearest code vectors, which follow the vectors that are assigned to them
by a moving average (appendix A.1).

    self.codebook = Codebook(512, dim)                                            # in __init__
    codes, vectors = self.codebook(z)                                             # in forward
    self.codebook.hold(z, codes, candidates, order, step)                         # in forward, once per micro-batch
    self.codebook.update(step, decay, restart, self.skipped)                      # in after_step

Everything that changes is a buffer, so it is saved in checkpoints. It is equal on all ranks, and does not depend on the
number of ranks and micro-batches.

Shapes: R vectors, K codes, D features, P candidates of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.ops.gather import gather, sum_over_world
from pretrain.ops.precision import wide

LEAST_USAGE = 1e-6  # a code that was used less keeps its vector


def nearest(z: Tensor, vectors: Tensor) -> Tensor:
    """The index of the nearest of the vectors [K, D] for each row of z [..., D]: int64 [...] (eq. 1). Of several that
    are equally near, the first; in fp32 or wider."""
    with torch.autocast(z.device.type, enabled=False):
        z, vectors = wide(z), wide(vectors)
        # ‖z − e‖² = ‖z‖² − 2 z·e + ‖e‖², of which the first term is the same for all codes
        return (z @ vectors.T - vectors.square().sum(1) / 2).argmax(-1)


class Codebook(nn.Module):
    """`vectors` [K, D], e in the paper, normal at first; `usage` [K] and `totals` [K, D], N and m in appendix A.1, the
    moving averages of the number and the sum of the vectors that a step assigns to a code."""

    vectors: Tensor
    usage: Tensor
    totals: Tensor

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.register_buffer("vectors", torch.randn(codes, dim))
        self.register_buffer("usage", torch.zeros(codes))
        self.register_buffer("totals", torch.zeros(codes, dim))
        # counts [K], sums [K, D], candidates [P, D] and order [P] of this rank's micro-batches in step `step`
        self.held: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.step = -1

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(codes [...], their vectors [..., D]) of z [..., D]; no gradient flows to z."""
        codes = nearest(z.detach(), self.vectors)
        return codes, self.vectors[codes]

    @torch.no_grad()
    def hold(self, z: Tensor, codes: Tensor, candidates: Tensor, order: Tensor, step: int) -> None:
        """Keep what `update` needs of the vectors z [R, D] of a micro-batch and of their codes [R]. `candidates` [P, D]:
        the vectors by which codes without use may be replaced, those with the lowest random numbers `order` int64 [P]
        first. What is still held from another step is dropped."""
        if step != self.step:
            self.held, self.step = [], step
        z, candidates = (x.detach().to(self.totals.dtype) for x in (z, candidates))
        counts = torch.zeros_like(self.usage).index_add_(0, codes, torch.ones_like(z[:, 0]))
        self.held.append((counts, torch.zeros_like(self.totals).index_add_(0, codes, z), candidates, order))

    @torch.no_grad()
    def update(self, step: int, decay: float, restart: float, skipped: Tensor | None = None) -> None:
        """N ← γ N + (1 − γ) n,  m ← γ m + (1 − γ) Σ z,  e ← m / N (appendix A.1), with γ = `decay` and the n vectors z
        of the global batch that were assigned to a code. Collective: every rank must call it.

        If `restart` is above 0, each code whose N is below the limit, `restart` times the mean N, is then set to the
        next candidate, as in Jukebox (arXiv 2005.00341, §3.1), and its N to the limit. No candidate replaces two codes:
        if there are fewer candidates than such codes, the other codes are left for the next step. `skipped` is
        `Objective.skipped`, a scalar on the device: if it is 1, nothing changes. Raises RuntimeError if `hold` was not
        called in this step.
        """
        if not self.held or step != self.step:
            raise RuntimeError(f"update({step}) without a hold(…, {step}) before it; call hold in forward")
        counts, sums, candidates, order = zip(*self.held, strict=True)
        self.held = []
        count, total = sum_over_world(torch.stack(counts).sum(0)), sum_over_world(torch.stack(sums).sum(0))
        usage = decay * self.usage + (1 - decay) * count
        totals = decay * self.totals + (1 - decay) * total
        known = (usage >= LEAST_USAGE).unsqueeze(1)
        vectors = torch.where(known, totals / usage.clamp_min(LEAST_USAGE).unsqueeze(1), self.vectors)
        if restart:
            limit, new = restart * usage.mean(), gather(torch.cat(candidates))
            new = new[gather(torch.cat(order)).argsort()]
            number = (usage < limit).cumsum(0) - 1  # [K]: of a code among those below the limit
            unused = (usage < limit) & (number < len(new))
            new = new[number.clamp(0, len(new) - 1)]  # [K, D]
            usage, unused = torch.where(unused, limit, usage), unused.unsqueeze(1)
            vectors, totals = torch.where(unused, new, vectors), torch.where(unused, limit * new, totals)
        for buffer, value in ((self.vectors, vectors), (self.usage, usage), (self.totals, totals)):
            buffer.copy_(value if skipped is None else torch.where(skipped > 0, buffer, value))

    def perplexity(self) -> Tensor:
        """exp of the entropy of the codes' shares in `usage`, a scalar from 1 to K: the number of codes in use. It is 1
        before the first step."""
        shares = self.usage / self.usage.sum().clamp_min(LEAST_USAGE)
        return (-torch.special.xlogy(shares, shares).sum()).exp()
