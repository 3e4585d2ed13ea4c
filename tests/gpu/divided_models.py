"""Small models whose attention is divided over two GPUs, and the same ones on a single GPU."""

import zlib
from dataclasses import dataclass

import torch

from cluster.config import CommsConfig
from cluster.model.config import ModelConfig
from cluster.model.cuda.divided_weights import DividedWeights
from cluster.model.cuda.random_weights import RandomWeights
from cluster.model.cuda.transformer import CudaTransformer, Quantization
from comms.groups import ParallelGroups
from router.placement import Placement
from tests.gpu.test_model_interpreted import small
from tests.model.solo import solo_groups

PATIENCE_S = 100.0  # one rank may still compile


class NamedWeights(RandomWeights):
    """Random by what a tensor is for, whatever else a rank asks for; on the CPU, of which there is one kind."""

    def _seed(self, *name: object) -> None:
        self._generator.manual_seed(hash(name) % 2**31)

    def embedding(self):
        self._seed(1)
        return super().embedding()

    def head(self, embedding):
        self._seed(2)
        return super().head(embedding)

    def norm(self, name, size=None, eps=None):
        self._seed(8, zlib.crc32(name.encode()))
        return super().norm(name, size, eps)

    def attention(self, layer):
        self._seed(3, layer)
        return super().attention(layer)

    def dense_mlp(self, layer):
        self._seed(4, layer)
        return super().dense_mlp(layer)

    def shared_expert(self, layer):
        self._seed(5, layer)
        return super().shared_expert(layer)

    def gate(self, layer):
        self._seed(6, layer)
        return super().gate(layer)

    def expert(self, moe_idx, expert):
        self._seed(7, moe_idx, expert)
        return super().expert(moe_idx, expert)


@dataclass(frozen=True, kw_only=True)
class DividedCase:
    """A model with random weights, what becomes of them, and how its sums are made."""

    kind: str
    combine: str
    quantization: Quantization = None

    @property
    def weights(self) -> NamedWeights:
        return NamedWeights(small(self.kind, positions=512), torch.device("cpu"))

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    @property
    def comms(self) -> CommsConfig:
        return CommsConfig(combine=self.combine, timeout_s=PATIENCE_S)

    @property
    def most_error(self) -> float:
        """Relative L2 of logits; a rank's heads and channels fill other blocks of 128, which FP8 rounds together."""
        return 0.02 if self.quantization is None else 0.1

    def on_one(self) -> CudaTransformer:
        placement = Placement.contiguous(1, self.config.num_experts, 1)
        return CudaTransformer.build(
            self.weights, solo_groups(), placement, self.comms,
            quantization=self.quantization, device=torch.device("cuda", 0),
        )  # fmt: skip

    def on_two(self, groups: ParallelGroups) -> CudaTransformer:
        from cluster.model.cuda.exchange import connect_exchange
        from cluster.model.cuda.tensor_parallel import connect_replica
        from cluster.model.cuda.transformer import kernel_ops

        torch.cuda.set_device(groups.rank)
        device = torch.device("cuda", groups.rank)
        placement = Placement.contiguous(1, self.config.num_experts, 2)
        exchange = connect_exchange(
            self.config, groups, placement, self.comms,
            float8=self.quantization == "fp8", capacity=512, device=device,
        )  # fmt: skip
        replica = connect_replica(
            self.config, groups, kernel_ops(), capacity=2048, device=device, timeout_s=PATIENCE_S
        )
        divided = DividedWeights(whole=self.weights, size=groups.tp.size, idx=groups.tp.idx)
        return CudaTransformer.build(
            divided, groups, placement, self.comms,
            quantization=self.quantization, device=device, exchange=exchange, replica=replica,
        )  # fmt: skip
