"""What a rank's memory holds: weights, cache, activations, messages; and whether that fits.

Weights are counted as `cluster/model/loader.py` shards them and `Transformer.memory()` reports
them. Activations and message buffers are estimates of the largest that live at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from cluster.model.config import MlaConfig, ModelConfig
from comms.topology import Topology
from simulations import arithmetic
from simulations.deployment import BYTES, Deployment
from simulations.hardware.calibration import Calibration
from simulations.times.step_work import Sends

_BFLOAT16, _FP32 = 2, 4
_MOST_NODES = 4096  # that a remedy may ask for


class DoesNotFit(ValueError):  # noqa: N818 - reads as what it says
    """The deployment needs more memory than a rank has; says by how much, and what would help."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of the fullest rank. `replicated`: all weights but those of routed experts."""

    capacity: float
    replicated: int
    experts: int
    kv: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        return self.replicated + self.experts + self.kv + self.activations + self.buffers

    @property
    def free(self) -> float:
        return self.capacity - self.total

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "free": self.free}


def rank_memory(
    deployment: Deployment, calibration: Calibration, *, max_tokens: int, kv_tokens: int
) -> MemoryPlan:
    """With at most `max_tokens` in a replica's step and `kv_tokens` in its cache.

    Raises DoesNotFit.
    """
    plan = _plan(deployment, calibration, max_tokens=max_tokens, kv_tokens=kv_tokens)
    if plan.free < 0:
        raise DoesNotFit(_refusal(deployment, calibration, plan, max_tokens, kv_tokens))
    return plan


def kv_capacity_tokens(
    deployment: Deployment, calibration: Calibration, *, max_tokens: int = 1024
) -> int:
    """Tokens that a replica's cache has room for beside everything else. Raises DoesNotFit."""
    plan = rank_memory(deployment, calibration, max_tokens=max_tokens, kv_tokens=0)
    return int(plan.free // deployment.kv_bytes_per_token)


def replicated_bytes(deployment: Deployment) -> int:
    """Weights that do not depend on the placement, on the fullest rank."""
    model, size = deployment.model, deployment.topology.tensor_parallel_size
    dtype, num_dense = BYTES[deployment.weights], model.num_layers - model.num_moe_layers
    attention = arithmetic.attention(model, size).params * dtype + _inner_norms(model) * _BFLOAT16
    vocabulary = arithmetic.head(model, size).params * _BFLOAT16
    gate = arithmetic.gate(model).params + model.num_experts * model.has_correction_bias
    shared = sum(gemm.params for gemm in arithmetic.shared_expert(model)) * dtype
    dense = sum(gemm.params for gemm in arithmetic.dense_mlp(model, size)) * dtype
    norms = (2 * model.num_layers + 1) * model.hidden_size * _BFLOAT16
    rotary = model.max_position_embeddings * model.rope.dim * _FP32  # cosines and sines
    return (
        (1 if model.tie_word_embeddings else 2) * vocabulary
        + model.num_layers * attention
        + model.num_moe_layers * (gate * _FP32 + shared)
        + num_dense * dense
        + norms
        + rotary
    )


def expert_slot_bytes(deployment: Deployment) -> int:
    """All slots of a rank, in all layers."""
    return deployment.model.num_moe_layers * deployment.slots_per_rank * deployment.expert_bytes


def _plan(
    deployment: Deployment, calibration: Calibration, *, max_tokens: int, kv_tokens: int
) -> MemoryPlan:
    return MemoryPlan(
        capacity=calibration.memory_bytes,
        replicated=replicated_bytes(deployment),
        experts=expert_slot_bytes(deployment),
        kv=kv_tokens * deployment.kv_bytes_per_token,
        activations=_activation_bytes(deployment, max_tokens),
        buffers=_buffer_bytes(deployment, max_tokens),
    )


def _inner_norms(model: ModelConfig) -> int:
    """Elements of the norms inside one layer's attention."""
    attention = model.attention
    if isinstance(attention, MlaConfig):
        return attention.q_lora_rank + attention.kv_lora_rank
    return 2 * attention.head_dim if attention.qk_norm else 0


def _activation_bytes(deployment: Deployment, max_tokens: int) -> int:
    """Residual and normalised rows beside the widest block's inputs and outputs, in bfloat16."""
    model, size = deployment.model, deployment.topology.tensor_parallel_size
    attention = arithmetic.attention(model, size)
    widest = max(
        sum(gemm.n * gemm.count for gemm in (*attention.before, *attention.after)),
        sum(gemm.n for gemm in arithmetic.dense_mlp(model, size)),
        sum(gemm.n for gemm in arithmetic.shared_expert(model)),
    )
    return max_tokens * (2 * model.hidden_size + widest) * _BFLOAT16


def _buffer_bytes(deployment: Deployment, max_tokens: int) -> int:
    """Rows sent and received in a dispatch, and their outputs in bfloat16.

    "low_latency" has room for every rank's tokens at each local expert; the others for twice the
    rows of even routing.
    """
    model, topology = deployment.model, deployment.topology
    of_rank = -(-max_tokens // topology.tensor_parallel_size)
    row = deployment.dispatch_row_bytes + deployment.combine_row_bytes
    if deployment.dispatcher == "low_latency":
        received = deployment.slots_per_rank * deployment.num_ranks * of_rank
    else:
        ranks = Sends.uniform(model, topology).ranks_per_token_L.max()
        received = int(2 * of_rank * ranks)
    return (received + of_rank) * row


def _refusal(
    deployment: Deployment,
    calibration: Calibration,
    plan: MemoryPlan,
    max_tokens: int,
    kv_tokens: int,
) -> str:
    topology = deployment.topology
    return (
        f"{deployment.model.architecture} on {topology.num_nodes} nodes x "
        f"{topology.ranks_per_node} ranks needs {plan.total / 1e9:.1f} GB a rank, "
        f"{plan.capacity / 1e9:.1f} GB are there: {-plan.free / 1e9:.1f} GB too much; "
        f"use {_remedy(deployment, calibration, max_tokens, kv_tokens)}"
    )


def _remedy(
    deployment: Deployment, calibration: Calibration, max_tokens: int, kv_tokens: int
) -> str:
    """The first of: fewer tokens, smaller weights, more nodes; that makes it fit."""

    def fits(changed: Deployment, kv_tokens: int = kv_tokens) -> bool:
        return _plan(changed, calibration, max_tokens=max_tokens, kv_tokens=kv_tokens).free >= 0

    if fits(deployment, 0):
        room = _plan(deployment, calibration, max_tokens=max_tokens, kv_tokens=0).free
        tokens = int(room // deployment.kv_bytes_per_token)
        return f"at most {tokens:,} tokens of cache a replica instead of {kv_tokens:,}"
    if deployment.weights != "float8" and "float8" in calibration.peak_flops:
        smaller = replace(deployment, weights="float8")
        if fits(smaller):
            return "weights in float8"
    nodes = deployment.topology.num_nodes
    while (nodes := nodes * 2) <= _MOST_NODES:
        if fits(_on_nodes(deployment, nodes)):
            return f"{nodes} nodes"
    return "ranks with more memory: no number of nodes is enough"


def _on_nodes(deployment: Deployment, num_nodes: int) -> Deployment:
    """With as many redundant experts as the ranks need for equal numbers of slots."""
    old, experts = deployment.topology, deployment.model.num_experts
    topology = Topology(
        num_nodes=num_nodes,
        ranks_per_node=old.ranks_per_node,
        tensor_parallel_size=old.tensor_parallel_size,
    )
    wanted = experts + deployment.num_redundant_experts
    slots = -(-wanted // topology.world_size) * topology.world_size
    return replace(deployment, topology=topology, num_redundant_experts=slots - experts)
