"""A replica of several ranks with plain torch for its kernels, beside the CPU's of the same checkpoint: how
heads, words and rows are divided."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.config import CommsConfig
from cluster.model.batch import ForwardBatch
from cluster.model.checkpoint import Checkpoint
from cluster.model.config import ModelConfig
from cluster.model.cuda.divided_weights import DividedWeights
from cluster.model.cuda.tensor_parallel import DividedReplica
from cluster.model.cuda.transformer import CudaTransformer
from cluster.model.kv_cache import KVCache
from cluster.model.loader import Loader
from cluster.model.transformer import Transformer
from comms.group import Group
from comms.groups import ParallelGroups
from comms.topology import Topology
from router.placement import Placement
from tests.gpu.plain_ops import PlainOps
from tests.model.solo import make_batch

CPU = torch.device("cpu")
BLOCK_SIZE = 16


@dataclass
class PlainRows:
    """`SymmetricRows` by the collectives of a group of processes."""

    group: Group
    num_rows: int = 1

    def expect(self, num_rows: int) -> None:
        self.num_rows = num_rows

    @property
    def num_own(self) -> int:
        return -(-self.num_rows // self.group.size)

    def gather(self, x_OH, added_OH=None, norm=None) -> tuple[Tensor, Tensor]:
        sum_OH = x_OH if added_OH is None else x_OH + added_OH
        rows_OH = sum_OH if norm is None else norm(sum_OH)
        assert len(rows_OH) == self.num_own
        return self.group.all_gather(rows_OH, self._sizes)[: self.num_rows], sum_OH

    def scatter(self, parts_TH, residual_OH=None, norm=None) -> tuple[Tensor, Tensor]:
        spare = sum(self._sizes) - self.num_rows
        sum_OH = self.group.reduce_scatter(F.pad(parts_TH, (0, 0, 0, spare)), self._sizes)
        if residual_OH is not None:
            sum_OH = sum_OH + residual_OH
        return sum_OH if norm is None else norm(sum_OH), sum_OH

    def gather_logits(self, logits_LW, first, out_LV) -> None:
        whole = torch.zeros(out_LV.shape, dtype=logits_LW.dtype)
        whole[:, first : first + logits_LW.shape[1]] = logits_LW
        out_LV.copy_(self.group.all_reduce(whole))

    def check(self) -> None:
        pass

    @property
    def _sizes(self) -> list[int]:
        return [self.num_own] * self.group.size


class NoExchange:
    """Of ranks that all have all experts."""

    forms = 1

    def expect(self, num_rows: int, form: int = 0) -> None:
        pass

    def check(self) -> None:
        pass


def build(groups: ParallelGroups, directory, *, cut_here: bool) -> CudaTransformer:
    """cut_here: the whole model's weights, cut afterwards instead of while they are read."""
    config, tp = ModelConfig.from_dir(directory), groups.tp
    alone = Topology(num_nodes=1, ranks_per_node=1)
    source = Loader(
        checkpoint=Checkpoint(directory),
        config=config,
        topology=alone if cut_here else groups.topology,
        rank=0 if cut_here else groups.rank,
        dtype=torch.bfloat16,
    )
    if cut_here:
        source = DividedWeights(whole=source, size=tp.size, idx=tp.idx)
    ops = PlainOps()
    rows = PlainRows(tp)
    replica = DividedReplica(
        rows=rows, size=tp.size, idx=tp.idx, vocab_size=config.vocab_size, ops=ops
    )
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, 1)
    return CudaTransformer.build(
        source, replace(groups, rank=0), placement, CommsConfig(combine="exact"),
        device=CPU, ops=ops, exchange=NoExchange(), replica=replica,
    )  # fmt: skip


def compare(groups: ParallelGroups, directory, cut_here: bool) -> float:
    """The greatest relative L2 of a row of logits between both backends; tokens are the same to both."""
    config = ModelConfig.from_dir(directory)
    placement = Placement.contiguous(config.num_moe_layers, config.num_experts, groups.world.size)
    cpu = Transformer.load(
        directory, config, groups, placement, torch.bfloat16, CommsConfig(combine="exact")
    )
    plain = build(groups, directory, cut_here=cut_here)
    kv = KVCache(config, groups.topology, 8, BLOCK_SIZE, torch.bfloat16)
    plain_kv = plain.new_cache(8, BLOCK_SIZE)
    assert plain_kv.layers[0].keys.shape[0] == kv.layers[0].keys.shape[0]
    make = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (22,), generator=make).tolist()
    steps = [
        [(ids[:20], 0, [3, 5], range(20)), (ids[:3], 0, [1], [2])],
        [(ids[20:21], 20, [3, 5], [0])],
        [(ids[21:], 21, [3, 5], [0]), (ids[7:9], 3, [1], [])],
    ]
    errors = [0.0]
    for parts in steps:
        batch = make_batch(parts, BLOCK_SIZE)
        expected, found = cpu.forward(batch, kv), plain.forward(batch, plain_kv)
        assert (found is None) == (expected is None) == (groups.tp.idx > 0)
        if found is not None:
            error = (found - expected).norm(dim=1) / expected.norm(dim=1)
            assert error.max() < 0.02, error  # also where it is no number
            assert expected.norm() > 1
            errors.append(float(error.max()))
    nothing = plain.forward(ForwardBatch.empty(), plain_kv)
    assert (nothing is None) == (groups.tp.idx > 0)
    attention = [model.memory()["attention"] for model in (plain, cpu)]
    assert attention[0] == attention[1]
    return max(errors)


@pytest.mark.parametrize(
    ("name", "size", "cut_here"),
    [
        ("deepseek_v2_greedy", 2, True),
        ("deepseek_v3_yarn", 2, False),
        ("qwen3_moe_norm", 2, True),
        ("mixtral", 4, False),
    ],
)
def test_logits_are_those_of_the_cpus_ranks(rank_pool, tiny_checkpoint, name, size, cut_here):
    layout = Topology(num_nodes=1, ranks_per_node=size, tensor_parallel_size=size)
    directory = tiny_checkpoint(name)
    error, *others = rank_pool.run(compare, layout, directory, cut_here)
    print(f"{name}: {error:.4f}")
    assert error < 0.02  # mostly 0: the same bits
    assert others == [0.0] * (size - 1)
