"""Ranks and leaders as the rebalancer sees them, in one event loop, which break when told to."""

import asyncio

import numpy as np

from router.placement import Placement


def placement(num_layers=2, num_experts=8, num_ranks=4, redundant=4):
    return Placement.contiguous(num_layers, num_experts, num_ranks, redundant, ranks_per_node=2)


class FakeRank:
    """Refuses what a real one refuses. `behaviour`: see `prepare`; `deaf`: answers no abandon."""

    def __init__(self, idx, at):
        self.idx = idx
        self.at = at
        self.prepared = None
        self.behaviour = "works"
        self.deaf = False
        self.abandoned = []
        self.routed_LE = np.zeros((at.num_layers, at.num_experts), dtype=np.int64)
        self.served_L = np.zeros(at.num_layers, dtype=np.int64)
        self.rows_LMK = np.zeros((at.num_layers, 0, 2), dtype=np.int64)
        self.sent = 0
        self.stats_error = None

    async def expert_stats(self):
        if self.stats_error:
            raise self.stats_error
        return {
            "epoch": self.at.epoch,
            "step": 1,
            "routed": self.routed_LE,
            "served": self.served_L.tolist(),
            "rows": list(self.rows_LMK),
            "step_seconds": [0.002, 0.004, 0.003],
            "bytes": {"intra_node": self.sent, "inter_node": 2 * self.sent},
            "migration": {"bytes": {"node": 3, "remote": 4, "disk": 5}, "flip_s": 0.0},
        }

    async def prepare(self, epoch, layer, row):
        for _ in range(1000):  # as a real one, which may learn of the last flip a moment later
            if self.at.epoch < epoch - 1:
                await asyncio.sleep(0.001)
        assert epoch == self.at.epoch + 1, f"prepare {epoch} at {self.at.epoch}"
        assert self.prepared is None, f"rank {self.idx} has {self.prepared.epoch} prepared already"
        if self.behaviour == "fails":
            raise RuntimeError("no holder answers")
        if self.behaviour == "hangs":
            await asyncio.sleep(3600)
        self.prepared = self.at.with_layers({layer: np.array(row)}, epoch)
        await asyncio.sleep(0)
        if self.behaviour == "prepares and then hangs":
            await asyncio.sleep(3600)

    async def abandon(self, epoch):
        if self.deaf:
            await asyncio.sleep(3600)
        self.abandoned.append(epoch)
        if self.prepared and self.prepared.epoch == epoch:
            self.prepared = None


class FakeLeaders:
    """Flips all ranks together once every leader was told, unless `stuck`; loses `lose` commits."""

    def __init__(self, ranks, num_replicas=2):
        self.ranks = ranks
        self.epochs = [ranks[0].at.epoch] * num_replicas
        self.committed = []
        self.stuck = False
        self.lose = 0

    def commit_placement(self, epoch):
        self.committed.append(epoch)
        assert all(r.prepared and r.prepared.epoch == epoch for r in self.ranks), "not all prepared"
        if self.lose:
            self.lose -= 1
        elif not self.stuck:
            self.flip()

    def flip(self):
        for rank in self.ranks:
            rank.at, rank.prepared = rank.prepared, None
        self.epochs = [self.ranks[0].at.epoch] * len(self.epochs)

    def placement_epochs(self):
        return self.epochs


def cluster(at=None):
    at = at or placement()
    ranks = [FakeRank(idx, at) for idx in range(at.num_ranks)]
    return ranks, FakeLeaders(ranks)
