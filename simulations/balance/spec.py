"""What `simulate balance` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cluster.model.config import ModelConfig
from comms.topology import Topology
from simulations.balance.load_shares import Workload
from simulations.balance.load_sources import Order
from simulations.balance.policies import POLICIES
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.memory import rank_memory

Phase = Literal["decode", "prefill"]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A file of recorded loads; `order` and `shift_every` as in `load_sources.py`."""

    path: Path
    order: Order = "mixed"
    shift_every: int = 500
    jitter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class BalanceSpec:
    """A run. Raises ValueError for what cannot be, naming it.

    tokens_per_rank: of a step; in "decode" sequences with `context` keys each, in "prefill" prompts of
    `context` tokens. interval: steps between two looks of our policy; window: steps that it
    remembers (EplbConfig's 64 looks of 1 s); eplb_interval: between EPLB's plans (SGLang's usual 1,000). bandwidth: bytes/s of weights that a rank of ours may receive.
    resplit_s: what counting and dividing a batch adds to each layer of `ours`; 0: all of it is hidden.
    """

    model_name: str
    deployment: Deployment
    calibration: Calibration
    load: Workload | Trace
    policies: tuple[str, ...] = POLICIES
    steps: int = 2000
    tokens_per_rank: int = 128
    context: int = 4096
    phase: Phase = "decode"
    interval: int = 50
    window: int = 1000
    eplb_interval: int = 1000
    bandwidth: float = 1e9
    resplit_s: float = 0.0
    units: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.policies:
            if name not in POLICIES:
                raise ValueError(f"unknown policy {name!r}: choose from {', '.join(POLICIES)}")
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies must be different ones of {', '.join(POLICIES)}")
        if self.phase not in get_args(Phase):
            raise ValueError(f"unknown phase {self.phase!r}: decode or prefill")
        for name in (
            "steps",
            "tokens_per_rank",
            "context",
            "interval",
            "window",
            "eplb_interval",
            "units",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.bandwidth > 0 or not self.resplit_s >= 0 or self.seed < 0:
            raise ValueError(
                f"bandwidth({self.bandwidth:g}) must be > 0, resplit_s({self.resplit_s:g}) and "
                f"seed({self.seed}) >= 0"
            )
        gate, topology = self.deployment.model.gate, self.deployment.topology
        if gate.num_experts > 2**14:
            raise ValueError(f"num_experts({gate.num_experts}) must be at most {2**14}")
        replica_tokens = self.tokens_per_rank * topology.tensor_parallel_size
        rank_memory(
            self.deployment,
            self.calibration,
            max_tokens=replica_tokens,
            kv_tokens=replica_tokens * (self.context if self.phase == "decode" else 1),
        )

    @property
    def tokens(self) -> int:
        """Of a step of one unit."""
        return self.tokens_per_rank * self.deployment.num_ranks


def spare_slot_each(model: ModelConfig, topology: Topology) -> int:
    """Redundant experts that give every rank one slot more than experts need."""
    ranks = topology.world_size
    return ranks * (-(-model.num_experts // ranks) + 1) - model.num_experts
