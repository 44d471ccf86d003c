"""Distribute work on whole matrices over the ranks, although each matrix is sharded by rows or replicated. Each matrix
is sent to one rank, its owner, which computes a result; the result is sent back to all ranks.

`Layout` describes how the ranks hold the matrices: each matrix is sharded on dim 0 over S ranks, as FSDP2 shards it,
and there are R replicas of these S ranks (DDP: S = 1; FSDP2: R = 1; HSDP: both above 1). Each of the R·S ranks is an
owner: owner o is shard o mod S of replica o div S. Matrices are sent in rounds. In a round, every owner gets a stack
[n, r, c] of matrices of one shape. A round consists of one all-to-all among the S ranks to the owners, one all-to-all
back, and one all-gather among the R replicas. All are asynchronous and return a function that waits, so that one round
can be sent while another is computed.
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

MAX_STACK_ELEMENTS = 1 << 24  # largest number of elements in a stack of several matrices
Shape = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """The position of this rank among the ranks that hold a matrix."""

    shards: int = 1
    shard: int = 0
    shard_group: Any = None
    replicas: int = 1
    replica: int = 0
    replica_group: Any = None

    @classmethod
    def of(cls, parameter: Tensor) -> Layout:
        """The layout of a parameter. A DTensor is sharded by FSDP2 or HSDP; any other tensor counts as replicated on
        all ranks."""
        if not isinstance(parameter, DTensor):
            rank, ranks = world()
            return cls(replicas=ranks, replica=rank)
        mesh = parameter.device_mesh
        last = mesh.ndim - 1
        shards = (mesh.size(last), mesh.get_local_rank(last), mesh.get_group(last))
        if mesh.ndim == 1:
            return cls(*shards)
        return cls(*shards, mesh.size(0), mesh.get_local_rank(0), mesh.get_group(0))

    @property
    def owners(self) -> int:
        return self.replicas * self.shards

    @property
    def own(self) -> int:
        """The number of this rank as an owner."""
        return self.replica * self.shards + self.shard

    def rows(self, total: int) -> list[int]:
        """The number of rows on each shard, of a matrix of `total` rows."""
        each = -(-total // self.shards)
        return [max(0, min(each, total - each * shard)) for shard in range(self.shards)]


def assign(costs: Sequence[float], owners: int) -> list[list[int]]:
    """Distribute items with these costs over the owners so that the sums of costs are nearly equal. Returns the indices
    of each owner's items. In order of decreasing cost, each item goes to the owner with the smallest sum so far."""
    assigned: list[list[int]] = [[] for _ in range(owners)]
    loads = [(0.0, owner) for owner in range(owners)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, owner = heapq.heappop(loads)
        assigned[owner].append(index)
        heapq.heappush(loads, (load + costs[index], owner))
    return assigned


def rounds_of(assigned: list[list[int]], kinds: Sequence[tuple], sizes: Sequence[int]) -> list[list[list[int]]]:
    """For each round, the stack of each owner: the indices of matrices of one kind, which have at most
    MAX_STACK_ELEMENTS elements together, or of a single matrix. `assigned`: the indices of each owner's matrices."""
    stacks: list[list[list[int]]] = [[] for _ in assigned]
    for owner_stacks, indices in zip(stacks, assigned, strict=True):
        by_kind = sorted(indices, key=lambda index: (kinds[index], index))
        for _, group in groupby(by_kind, lambda index: kinds[index]):
            same = list(group)
            max_matrices = max(1, MAX_STACK_ELEMENTS // sizes[same[0]])
            owner_stacks += [same[n : n + max_matrices] for n in range(0, len(same), max_matrices)]
    return [list(round) for round in zip_longest(*stacks, fillvalue=[])]


class Round:
    """One round: `stacks[o]` are the indices of owner o's matrices, `shapes[i]` is the shape (r, c) of matrix i."""

    def __init__(self, layout: Layout, stacks: list[list[int]], shapes: Sequence[Shape]):
        self.layout, self.stacks, self.shapes = layout, stacks, shapes
        first = layout.replica * layout.shards
        self.mine = stacks[layout.own]
        self.group = stacks[first : first + layout.shards]  # the stacks of the owners in this rank's replica
        shape = shapes[self.mine[0]] if self.mine else (0, 0)
        self.stack = (len(self.mine), *shape)  # shape [n, r, c] of this rank's stack
        self.rows = layout.rows(shape[0])
        # number of elements of the stack that this rank receives from each shard
        self.received = [len(self.mine) * rows * shape[1] for rows in self.rows]

    def _sizes(self, stacks: list[list[int]]) -> list[int]:
        """The number of elements that this rank holds of each of these stacks."""
        shard, shapes = self.layout.shard, self.shapes
        return [sum(self.layout.rows(shapes[i][0])[shard] * shapes[i][1] for i in stack) for stack in stacks]

    def to_owners(self, pieces: dict[int, Tensor]) -> Callable[[], Tensor]:
        """Send this rank's rows of the matrices of its replica, `pieces` by index, to the owners. Returns a function
        that waits for this rank's own stack [n, r, c]. Collective."""
        flat = [pieces[i].flatten() for stack in self.group for i in stack]
        reference = next(iter(pieces.values()))
        sent = torch.cat(flat) if flat else reference.new_empty(0)
        if self.layout.shards == 1:
            return lambda: sent.view(self.stack)
        out, wait = self._all_to_all(sent, self.received, self._sizes(self.group))

        def finish() -> Tensor:
            wait()
            parts = zip(out.split(self.received), self.rows, strict=True)
            return torch.cat([part.view(self.stack[0], rows, self.stack[2]) for part, rows in parts], 1)

        return finish

    def from_owners(self, result: Tensor) -> Callable[[], dict[int, Tensor]]:
        """Send the results for this rank's stack, [n, r, c], to all ranks. Returns a function that waits for this
        rank's rows of all results of the round, by index. Collective."""
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
        largest = max(sum(self._sizes(stacks)) for stacks in by_replica)
        padded = torch.cat([back, back.new_zeros(largest - len(back))])
        gathered = back.new_empty(layout.replicas * largest)
        work = all_gather(gathered, padded, group=layout.replica_group, async_op=True)

        def finish_replicas() -> dict[int, Tensor]:
            work.wait()
            out: dict[int, Tensor] = {}
            for flat, stacks in zip(gathered.view(layout.replicas, largest), by_replica, strict=True):
                out |= self._unpacked(flat, stacks)
            return out

        return finish_replicas

    def _all_to_all(self, sent: Tensor, received: list[int], sizes: list[int]) -> tuple[Tensor, Callable[[], Any]]:
        out = sent.new_empty(sum(received))
        work = dist.all_to_all_single(out, sent, received, sizes, self.layout.shard_group, async_op=True)
        return out, work.wait

    def _unpacked(self, flat: Tensor, stacks: list[list[int]]) -> dict[int, Tensor]:
        """This rank's rows of the matrices of these stacks, by index, from one flat tensor."""
        out, start = {}, 0
        for index in (i for stack in stacks for i in stack):
            rows, columns = self.layout.rows(self.shapes[index][0])[self.layout.shard], self.shapes[index][1]
            out[index] = flat[start : start + rows * columns].view(rows, columns)
            start += rows * columns
        return out


def _nothing() -> None:
    pass
