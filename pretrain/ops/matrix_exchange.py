"""Matrices whose rows are sharded over ranks, or that every rank has, shared out as work: each rank gets some of them
whole, and all ranks get what it makes of them.

`Layout` says how the ranks hold the matrices: each is sharded on dim 0 over S ranks, as FSDP2 shards it, and there are
R replicas of these S ranks (DDP: S = 1; FSDP2: R = 1; HSDP: both). Owner o of the R·S is shard o mod S of replica o
div S. Matrices travel in rounds, in each of which every owner gets a stack of matrices of one shape [n, r, c]; each
round is one all-to-all among the S ranks to the owners, one back, and one all-gather among the R replicas. All return a
function that waits, so that a round travels while another is computed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain.ops.gather import all_gather, world

MAX_STACKED = 1 << 24  # numbers of a stack of several matrices
Shape = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """This rank's place among the ranks that hold a matrix."""

    shards: int = 1
    shard: int = 0
    shard_group: Any = None
    replicas: int = 1
    replica: int = 0
    replica_group: Any = None

    @classmethod
    def of(cls, parameter: Tensor) -> Layout:
        """Of a parameter of FSDP2 or HSDP; any other is taken to be replicated on all ranks."""
        if not isinstance(parameter, DTensor):
            rank, ranks = world()
            return cls(replicas=ranks, replica=rank)
        mesh = parameter.device_mesh
        last = mesh.ndim - 1
        sharded = cls(mesh.size(last), mesh.get_local_rank(last), mesh.get_group(last))
        if mesh.ndim == 1:
            return sharded
        return cls(
            sharded.shards, sharded.shard, sharded.shard_group, mesh.size(0), mesh.get_local_rank(0), mesh.get_group(0)
        )

    @property
    def owners(self) -> int:
        return self.replicas * self.shards

    @property
    def own(self) -> int:
        """The number of this rank as an owner."""
        return self.replica * self.shards + self.shard

    def rows(self, total: int) -> list[int]:
        """The rows of a matrix of `total` rows on each shard."""
        each = -(-total // self.shards)
        return [max(0, min(each, total - each * shard)) for shard in range(self.shards)]


def deal(costs: Sequence[float], owners: int) -> list[list[int]]:
    """The indices of `costs` for each owner, with nearly equal sums: the most expensive first, each to the owner with
    the least so far."""
    dealt: list[list[int]] = [[] for _ in range(owners)]
    loads = [(0.0, owner) for owner in range(owners)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, owner = heapq.heappop(loads)
        dealt[owner].append(index)
        heapq.heappush(loads, (load + costs[index], owner))
    return dealt


def rounds_of(dealt: list[list[int]], kinds: Sequence[tuple], sizes: Sequence[int]) -> list[list[list[int]]]:
    """For each round, the stack of each owner: indices of matrices of one kind, with `MAX_STACKED` numbers at most
    unless it is a single one."""
    stacks: list[list[list[int]]] = [[] for _ in dealt]
    for own, indices in zip(stacks, dealt, strict=True):
        for _, alike in groupby(sorted(indices, key=lambda index: (kinds[index], index)), lambda index: kinds[index]):
            same = list(alike)
            most = max(1, MAX_STACKED // sizes[same[0]])
            own += [same[n : n + most] for n in range(0, len(same), most)]
    return [list(round) for round in zip_longest(*stacks, fillvalue=[])]


class Round:
    """One round: `stacks[o]` are the indices of owner o's matrices, `shapes[i]` is the shape (r, c) of matrix i."""

    def __init__(self, layout: Layout, stacks: list[list[int]], shapes: Sequence[Shape]):
        self.layout, self.stacks, self.shapes = layout, stacks, shapes
        first = layout.replica * layout.shards
        self.mine = stacks[layout.own]
        self.group = stacks[first : first + layout.shards]  # of the owners of this rank's replica
        shape = shapes[self.mine[0]] if self.mine else (0, 0)
        self.stack = (len(self.mine), *shape)  # [n, r, c] of this rank
        self.rows = layout.rows(shape[0])
        self.received = [len(self.mine) * rows * shape[1] for rows in self.rows]  # numbers, by the shard they come from

    def _sizes(self, stacks: list[list[int]]) -> list[int]:
        """The numbers that this rank holds of each of these stacks."""
        shard = self.layout.shard
        held = [[self.layout.rows(r)[shard] * c for r, c in (self.shapes[i] for i in stack)] for stack in stacks]
        return [sum(sizes) for sizes in held]

    def to_owners(self, pieces: dict[int, Tensor]) -> Callable[[], Tensor]:
        """From this rank's rows of the matrices of its replica, by index, to its own stack [n, r, c]; a function that
        waits for it. Collective."""
        held = [pieces[i].flatten() for stack in self.group for i in stack]
        reference = next(iter(pieces.values()))
        sent = torch.cat(held) if held else reference.new_empty(0)
        if self.layout.shards == 1:
            return lambda: sent.view(self.stack)
        out, wait = self._all_to_all(sent, self.received, self._sizes(self.group))

        def finish() -> Tensor:
            wait()
            parts = zip(out.split(self.received), self.rows, strict=True)
            return torch.cat([part.view(self.stack[0], rows, self.stack[2]) for part, rows in parts], 1)

        return finish

    def from_owners(self, result: Tensor) -> Callable[[], dict[int, Tensor]]:
        """From what this rank made of its stack, [n, r, c], to this rank's rows of all matrices of the round, by index;
        a function that waits for them. Collective."""
        layout = self.layout
        if layout.shards == 1:
            back, wait = result.flatten(), _nothing
        else:
            sent = torch.cat([part.flatten() for part in result.split(self.rows, 1)])
            back, wait = self._all_to_all(sent, self._sizes(self.group), self.received)
        if layout.replicas == 1:

            def finish() -> dict[int, Tensor]:
                wait()
                return self._unpacked(back, self.group)

            return finish
        wait()
        by_replica = [self.stacks[n : n + layout.shards] for n in range(0, layout.owners, layout.shards)]
        most = max(sum(self._sizes(stacks)) for stacks in by_replica)
        padded = torch.cat([back, back.new_zeros(most - len(back))])
        everything = back.new_empty(layout.replicas * most)
        work = all_gather(everything, padded, group=layout.replica_group, async_op=True)

        def finish_replicas() -> dict[int, Tensor]:
            work.wait()
            out: dict[int, Tensor] = {}
            for flat, stacks in zip(everything.view(layout.replicas, most), by_replica, strict=True):
                out |= self._unpacked(flat, stacks)
            return out

        return finish_replicas

    def _all_to_all(self, sent: Tensor, received: list[int], sizes: list[int]) -> tuple[Tensor, Callable[[], Any]]:
        out = sent.new_empty(sum(received))
        work = dist.all_to_all_single(out, sent, received, sizes, self.layout.shard_group, async_op=True)
        return out, work.wait

    def _unpacked(self, flat: Tensor, stacks: list[list[int]]) -> dict[int, Tensor]:
        out, start = {}, 0
        for index in (i for stack in stacks for i in stack):
            rows, columns = self.layout.rows(self.shapes[index][0])[self.layout.shard], self.shapes[index][1]
            out[index] = flat[start : start + rows * columns].view(rows, columns)
            start += rows * columns
        return out


def _nothing() -> None:
    pass
