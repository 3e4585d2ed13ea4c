"""A batch of tokens for named experts, and placements of it: the same sums in other places.

Legend: N tokens of the batch, E experts, K top-k, H hidden, T tokens of one rank, P pairs.

Dispatchers know only slots and ranks. Here tokens and experts have names of their own, so that what
comes home can be compared token by token after everything has moved.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from comms.codecs import CODECS
from comms.dispatcher import Received
from comms.reference import RankInput
from comms.topology import Topology

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
# Greatest error of an element by its block's greatest magnitude: half a step of e4m3; half of 1/510
# of 32 octaves; half a step of 2^(bits-1) - 1, under a scale that is rounded up by at most 2^-8.
CODEC_ERROR = {
    "float8": 2.0**-4,
    "float8_ue8m0": 2.0**-4,
    "logfmt10": 0.023,
    "int6": 0.5 / 31 * (1 + 2.0**-7),
    "int8": 0.5 / 127 * (1 + 2.0**-7),
    "int10": 0.5 / 511 * (1 + 2.0**-7),
}
_LEAST = 1e-9  # absolute: the codecs' floors under their scales


@dataclass(frozen=True, kw_only=True)
class Batch:
    """experts_NK: -1 = none; an expert may come twice. gain_E: what an expert multiplies with."""

    x_NH: Tensor
    experts_NK: Tensor
    weights_NK: Tensor
    range_N: Tensor
    gain_E: Tensor

    @property
    def used_NK(self) -> Tensor:
        return self.experts_NK >= 0

    @property
    def gain_NK(self) -> Tensor:
        """Weight times gain of each pair, fp64; 0 where there is none."""
        gain_NK = self.gain_E.double()[self.experts_NK.clamp(min=0)]
        return torch.where(self.used_NK, self.weights_NK.double() * gain_NK, 0.0)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """tokens[rank]: which tokens of the batch live there, in which order. slot_E: global slots."""

    topology: Topology
    slots_per_rank: int
    tokens: tuple[Tensor, ...]
    slot_E: Tensor

    def input_of(self, rank: int, batch: Batch) -> RankInput:
        mine_T = self.tokens[rank]
        return RankInput(
            x_TH=batch.x_NH[mine_T],
            slots_TK=self.slots_of(batch.experts_NK)[mine_T],
            weights_TK=batch.weights_NK[mine_T],
            range_T=batch.range_N[mine_T],
        )

    def slots_of(self, experts_NK: Tensor) -> Tensor:
        return torch.where(experts_NK >= 0, self.slot_E[experts_NK.clamp(min=0)], -1)

    def ranks_of(self, experts_NK: Tensor) -> Tensor:
        return self.slots_of(experts_NK).div(self.slots_per_rank, rounding_mode="floor")

    def expert_outputs(self, received: Received, rank: int, batch: Batch) -> Tensor:
        """y_PH in the model's dtype: each row times the gain of the expert in the slot."""
        gain_S = torch.full((self.topology.world_size * self.slots_per_rank,), torch.nan)
        gain_S[self.slot_E] = batch.gain_E
        rows, ks = (received.local_slots_RK >= 0).nonzero(as_tuple=True)
        slots_P = rank * self.slots_per_rank + received.local_slots_RK[rows, ks]
        y_PH = received.x_RH[rows].float() * gain_S[slots_P, None]
        return y_PH.to(received.x_RH.dtype)

    def by_token(self, outs: list[Tensor]) -> Tensor:
        """out_NH from the out_TH of all ranks; a token that nobody brought home stays NaN."""
        num_tokens = sum(len(mine_T) for mine_T in self.tokens)
        out_NH = torch.full((num_tokens, outs[0].shape[1]), torch.nan, dtype=outs[0].dtype)
        for mine_T, out_TH in zip(self.tokens, outs, strict=True):
            out_NH[mine_T] = out_TH
        return out_NH

    def with_ranks_renamed(self, names: list[int]) -> "Placement":
        """Rank r becomes names[r], with its tokens and its slots."""
        tokens = list(self.tokens)
        for rank, name in enumerate(names):
            tokens[name] = self.tokens[rank]
        ranks_E = self.slot_E.div(self.slots_per_rank, rounding_mode="floor")
        slot_E = torch.tensor(names)[ranks_E] * self.slots_per_rank
        slot_E += self.slot_E % self.slots_per_rank
        return replace(self, tokens=tuple(tokens), slot_E=slot_E)


def skewed(rng: np.random.Generator, count: int, shape: tuple[int, ...], skew: float) -> Tensor:
    """Ids in [0, count): uniform for skew 0, Zipf with that exponent above, all one for infinity."""
    p = np.zeros(count)
    p[0] = 1.0
    if np.isfinite(skew):
        p = np.arange(1, count + 1) ** -skew
    names = rng.permutation(count)
    return torch.from_numpy(names[rng.choice(count, shape, p=p / p.sum())])


def make_batch(
    rng: np.random.Generator,
    *,
    tokens: int,
    experts: int,
    num_topk: int,
    hidden: int,
    dtype: torch.dtype,
    skew: float = 0.0,
    missing: float = 0.1,
    identity: bool = False,
) -> Batch:
    """`missing`: the share of -1 entries. Ranges from generous to those that most sums escape."""
    experts_NK = skewed(rng, experts, (tokens, num_topk), skew)
    experts_NK[torch.from_numpy(rng.random((tokens, num_topk)) < missing)] = -1
    x_NH = torch.from_numpy(rng.standard_normal((tokens, hidden))).to(dtype)
    weights_NK = torch.from_numpy(rng.uniform(0.1, 1.0, (tokens, num_topk))).float()
    gain_E = torch.ones(experts)
    if not identity:
        gain_E += torch.from_numpy(rng.uniform(-2.0, 2.0, experts)).float()
    batch = Batch(
        x_NH=x_NH, experts_NK=experts_NK, weights_NK=weights_NK, range_N=weights_NK, gain_E=gain_E
    )
    size_N = batch.gain_NK.abs().sum(dim=1) * x_NH.double().abs().amax(dim=1) + 1e-3
    range_N = size_N * torch.exp2(torch.from_numpy(rng.integers(-3, 4, tokens)))
    return replace(batch, range_N=range_N.float())


def make_placement(
    rng: np.random.Generator,
    topology: Topology,
    *,
    tokens: int,
    experts: int,
    skew: float | None = 0.0,
    spare_slots: int = 0,
) -> Placement:
    """Experts in random slots; tokens in random order on random ranks, some of which have none.

    With skew None every rank has as many tokens, or one more.
    """
    slots_per_rank = -(-experts // topology.world_size) + spare_slots
    num_slots = topology.world_size * slots_per_rank
    rank_N = torch.from_numpy(rng.permutation(tokens)) % topology.world_size
    if skew is not None:
        rank_N = skewed(rng, topology.world_size, (tokens,), skew)
    order_N = torch.from_numpy(rng.permutation(tokens))
    return Placement(
        topology=topology,
        slots_per_rank=slots_per_rank,
        tokens=tuple(order_N[rank_N[order_N] == rank] for rank in range(topology.world_size)),
        slot_E=torch.from_numpy(rng.permutation(num_slots)[:experts]),
    )


def exact_sum(batch: Batch, dispatch_dtype: str) -> Tensor:
    """What comes home but for combine's own roundings, fp64: outputs are rounded as experts do."""
    codec, dtype = CODECS[dispatch_dtype], batch.x_NH.dtype
    carried_NH = codec.decode(codec.encode(batch.x_NH), batch.x_NH.shape[1], dtype)
    gain_NK1 = batch.gain_E[batch.experts_NK.clamp(min=0)][:, :, None]
    y_NKH = (carried_NH.float()[:, None] * gain_NK1).to(dtype).double()
    weights_NK = torch.where(batch.used_NK, batch.weights_NK.double(), 0.0)
    return (y_NKH * weights_NK[:, :, None]).sum(dim=1)


def dispatch_bound(batch: Batch, dispatch_dtype: str) -> Tensor:
    """How far quantised tokens may move the sum, [N, 1]."""
    if dispatch_dtype == "bfloat16":
        return torch.zeros(len(batch.x_NH), 1, dtype=torch.float64)
    error = CODEC_ERROR[dispatch_dtype] + HALF_ULP[batch.x_NH.dtype]
    return error * _size(batch) + _LEAST


def combine_bound(
    batch: Batch, topology: Topology, combine: str, combine_dtype: str, exact_NH: Tensor
) -> Tensor:
    """How far combine's roundings may take out_NH from the exact sum, [N, H].

    An addend passes its product with the weight and at most K + ranks + nodes additions, in fp32;
    "node" rounds each node's sum once, "fixed" each pair to half a step; all round to the dtype.
    """
    dtype, num_topk = batch.x_NH.dtype, batch.experts_NK.shape[1]
    size_N1 = _size(batch)
    additions = 1 + num_topk + topology.ranks_per_node + topology.num_nodes
    bound_N1 = 1.01 * additions * HALF_ULP[torch.float32] * size_N1
    if combine == "fixed":
        steps = 2.0**22 if dtype == torch.float32 else 2.0**15
        bound_N1 = bound_N1 + num_topk * 0.5 * batch.range_N.double()[:, None] / steps
    elif combine == "node" and combine_dtype != "bfloat16":
        bound_N1 = bound_N1 + 1.01 * CODEC_ERROR[combine_dtype] * size_N1 + _LEAST
    elif combine == "node" and dtype != torch.float32:
        bound_N1 = bound_N1 + 1.01 * HALF_ULP[dtype] * size_N1
    return bound_N1 + HALF_ULP[dtype] * (exact_NH.abs() + bound_N1)


def _size(batch: Batch) -> Tensor:
    """Sum of the pairs' greatest magnitudes, [N, 1]; 2^-4 more is what any codec can add."""
    greatest_N = batch.x_NH.double().abs().amax(dim=1)
    return (1 + 2.0**-4) * (batch.gain_NK.abs().sum(dim=1) * greatest_N)[:, None]
