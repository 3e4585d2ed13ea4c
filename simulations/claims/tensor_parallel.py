"""The baseline of expert parallelism: a model divided by tensor parallelism over all ranks of a group.

Every rank has a T-th of every matrix: attention heads, channels of dense MLPs, of shared and of all
routed experts (Megatron-LM, Shoeybi et al. 2019, section 3), and of the vocabulary. Whole on every
rank are MLA's down-projections, the gate, and with MLA the cache: its latent serves all heads. All
ranks work on all tokens of the group, so there is no dispatch and nothing to balance, and each layer
ends its attention and its MLP with an all-reduce of [tokens, hidden] in bfloat16:

    step = what a model of that thickness takes on one rank + 2 layers x all-reduce(2 bytes x tokens x hidden)

The first term is the cost model of a one-rank deployment of the thinner model: the same constants as
for expert parallelism. All-reduces are exposed, as in vLLM and SGLang, but take the best algorithm at
each size and start sooner than a dispatch (ALL_REDUCE_ALPHA_S); gathering logits is left out. All three
favour the baseline.

B steps, L expert layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.model.config import GqaConfig, MlaConfig, ModelConfig
from cluster.model.kv_cache import local_kv_heads
from comms.topology import Topology
from simulations.cost import CostModel, StepWork
from simulations.deployment import ComputeDtype, Deployment
from simulations.hardware.calibration import Calibration
from simulations.memory import DoesNotFit, MemoryPlan, rank_memory
from simulations.times.all_reduce import Algorithm, all_reduce_seconds

Array = NDArray[Any]

ALL_REDUCE_ALPHA_S = {"node": 10e-6, "network": 20e-6}
"""Of a message; a calibration's own where that is less, for those are fitted to dispatch kernels, which
count and pack as well. node: copies of 4 to 256 KB between two H200 (calibration h200-measured).
network: what DeepEP's exchanges over 2 nodes start with in AIConfigurator's tables, fitted."""
_ALL_REDUCES = 2  # per layer
_BFLOAT16 = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupTimes:
    """Seconds [B]. compute_B: a rank's own work; all_reduce_B: of all layers."""

    compute_B: Array
    all_reduce_B: Array

    @property
    def total_B(self) -> Array:
        return self.compute_B + self.all_reduce_B


class TensorParallel:
    """One group of num_nodes x ranks_per_node ranks, which holds the model once.

    Raises ValueError for a size that does not divide heads or an expert's channels.
    """

    def __init__(
        self,
        model: ModelConfig,
        calibration: Calibration,
        *,
        num_nodes: int,
        ranks_per_node: int,
        weights: ComputeDtype = "float8",
        all_reduce: Algorithm = "best",
    ) -> None:
        self.model, self.calibration = model, calibration
        self.num_nodes, self.ranks_per_node = num_nodes, ranks_per_node
        self.size = num_nodes * ranks_per_node
        self._algorithm: Algorithm = all_reduce
        self.of_rank = Deployment(
            model=thinner(model, self.size),
            topology=Topology(num_nodes=1, ranks_per_node=1),
            weights=weights,
            dispatcher="flat",
        )
        self.links = {
            tier: replace(
                calibration.links[tier], alpha_s=min(calibration.links[tier].alpha_s, most)
            )
            for tier, most in ALL_REDUCE_ALPHA_S.items()
        }
        self._cost = CostModel(self.of_rank, calibration)

    @property
    def warnings(self) -> list[str]:
        """The cost model's, but for the number of ranks: of that the one rank says nothing."""
        return [warning for warning in self._cost.warnings if ": ranks" not in warning]

    def memory(self, *, max_tokens: int, kv_tokens: int) -> MemoryPlan:
        """Of a rank, with so many tokens in the group's step and in its cache. Raises DoesNotFit."""
        return rank_memory(
            self.of_rank, self.calibration, max_tokens=max_tokens, kv_tokens=kv_tokens
        )

    def step(self, work: StepWork, counts_BLE: Array) -> GroupTimes:
        """work: the group's, [B, 1]; counts: how many of its tokens chose each expert."""
        num_bytes_B = work.tokens_BD[:, 0] * (self.model.hidden_size * _BFLOAT16)
        seconds_B = all_reduce_seconds(
            num_bytes_B,
            ranks_per_node=self.ranks_per_node,
            num_nodes=self.num_nodes,
            **self.links,
            algorithm=self._algorithm,
        )
        compute_B = self._cost.step(work, counts_BLE).total_B
        all_reduce_B = _ALL_REDUCES * self.model.num_layers * seconds_B * (num_bytes_B > 0)
        return GroupTimes(
            compute_B=compute_B, all_reduce_B=np.broadcast_to(all_reduce_B, compute_B.shape)
        )


def thinner(model: ModelConfig, size: int) -> ModelConfig:
    """What one of `size` ranks computes. Raises ValueError with the equation that does not hold."""
    attention = model.attention
    for name, value in (
        ("num_attention_heads", attention.num_heads),
        ("an expert's channels", model.expert_intermediate_size),
    ):
        if size < 1 or value % size:
            raise ValueError(
                f"tensor parallelism over {size} ranks must divide {name}: {value} % {size} = "
                f"{value % size if size else value}"
            )
    return replace(
        model,
        attention=_thinner_attention(attention, size),
        expert_intermediate_size=model.expert_intermediate_size // size,
        shared_intermediate_size=-(-model.shared_intermediate_size // size),
        dense_intermediate_size=-(-model.dense_intermediate_size // size),
        vocab_size=-(-model.vocab_size // size),
    )


def _thinner_attention(attention: GqaConfig | MlaConfig, size: int) -> GqaConfig | MlaConfig:
    heads = attention.num_heads // size
    if isinstance(attention, MlaConfig):
        return replace(attention, num_heads=heads)
    kv_heads = local_kv_heads(attention.num_kv_heads, size)
    return replace(attention, num_heads=heads, num_kv_heads=kv_heads)


def smallest_group(
    model: ModelConfig,
    calibration: Calibration,
    *,
    ranks_per_node: int,
    max_tokens: int,
    kv_tokens: int,
    weights: ComputeDtype = "float8",
) -> TensorParallel:
    """Of 1, 2, 4, ... nodes, the fewest whose ranks' memory is enough.

    Raises ValueError if the sizes that divide the model are not (DoesNotFit), or none divides it.
    """
    refusal: ValueError | None = None
    for num_nodes in (1, 2, 4, 8, 16):
        try:
            group = TensorParallel(
                model,
                calibration,
                num_nodes=num_nodes,
                ranks_per_node=ranks_per_node,
                weights=weights,
            )
            group.memory(max_tokens=max_tokens, kv_tokens=kv_tokens)
        except DoesNotFit as error:
            refusal = error
        except ValueError as error:
            raise refusal or error from error
        else:
            return group
    assert refusal is not None
    raise refusal
