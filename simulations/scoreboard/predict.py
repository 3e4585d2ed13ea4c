"""What the cost model says under the conditions of a target.

The same random numbers are drawn for every prediction, so that two which differ in one condition
differ by it alone. Two micro-batches are drawn as one and doubled: their chance is that of half the
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from comms.topology import Topology
from simulations.cost import CostModel, Sends, StepWork
from simulations.deployment import Deployment, Dispatcher, Overlap
from simulations.hardware.calibration import Calibration
from simulations.presets import load_model
from simulations.scoreboard import skew
from simulations.scoreboard.routing import Balance, IntArray, Routing, imbalance
from simulations.times.network import Link

SEED = 20250505
NUM_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class Run:
    """Conditions of a step: what a rank works on is the subclass's.

    layers_only: without what belongs to no layer. loads: whose experts' loads. output: tokens/s of a node, or ms of the step.
    """

    nodes: int
    redundant: int
    overlap: Overlap
    balance: Balance
    dispatcher: Dispatcher
    calibration: str
    ranks_per_node: int = 8
    model: str = "deepseek-v3"
    layers_only: bool = False
    loads: skew.Loads = "recorded"
    output: Literal["throughput", "step_ms"] = "throughput"

    @property
    def deployment(self) -> Deployment:
        return Deployment(
            model=load_model(self.model),
            topology=Topology(
                num_nodes=self.nodes, ranks_per_node=self.ranks_per_node, tensor_parallel_size=1
            ),
            num_redundant_experts=self.redundant,
            dispatcher=self.dispatcher,
            overlap=self.overlap,
        )

    def predicted(
        self,
        work: StepWork,
        tokens: float,
        output_tokens: float,
        experts: skew.Skew,
        prompt: int = 0,
    ) -> float:
        """tokens: of a rank in a step; prompt: their prompts' length, 0 in decode."""
        deployment = self.deployment
        parts = 2 if self.overlap == "two_batch" else 1
        share = tokens * deployment.num_ranks / parts
        routing = Routing(
            num_experts=deployment.model.num_experts,
            num_slots=deployment.num_slots,
            num_ranks=deployment.num_ranks,
            num_nodes=self.nodes,
            num_groups=deployment.model.gate.num_groups,
            top_k=deployment.model.gate.num_experts_per_token,
            num_layers=deployment.model.num_moe_layers,
            tokens=round(share),
            balance=self.balance,
            skew=experts,
            distinct_prompts=round(share / prompt) if prompt else None,
        )
        cost = CostModel(deployment, Calibration.named(self.calibration))
        times = cost.step(work, _drawn(routing) * parts)
        step_s = float(times.total_B.mean())
        if self.layers_only:
            step_s -= float(times.head_B.mean()) + cost.calibration.step_s
        if self.output == "step_ms":
            return 1e3 * step_s
        return self.ranks_per_node * output_tokens / step_s


@dataclass(frozen=True, kw_only=True)
class Decode(Run):
    """`requests` a rank; accepted: tokens that a request gains in a step, of tokens_per_request."""

    requests: int
    context: int
    tokens_per_request: int
    accepted: float

    def __call__(self) -> float:
        each = self.tokens_per_request
        work = StepWork.decode(self.requests, self.context, tokens_per_sequence=each)
        gained = self.requests * self.accepted
        return self.predicted(work, self.requests * each, gained, skew.decode(self.loads))


@dataclass(frozen=True, kw_only=True)
class Prefill(Run):
    """`tokens` a rank, in prompts of `prompt`."""

    tokens: int
    prompt: int

    def __call__(self) -> float:
        work = StepWork.prefill(self.tokens, self.prompt)
        experts = skew.prefill(self.loads, self.prompt)
        return self.predicted(work, self.tokens, self.tokens, experts, self.prompt)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One dispatch or combine with uniform routing, `tokens` a rank.

    groups_per_token: DeepEP's test of its normal kernels chooses so many nodes at most, then among
    all their experts.
    """

    way: Literal["dispatch", "combine"]
    nodes: int
    tokens: int
    dispatcher: Dispatcher
    calibration: str
    groups_per_token: int = 0

    def seconds(self) -> float:
        sends = self._sends() if self.groups_per_token else None
        deployment = self._deployment
        cost = CostModel(deployment, Calibration.named(self.calibration))
        top_k, ranks = deployment.model.gate.num_experts_per_token, deployment.num_ranks
        pairs_BLR = np.full((1, 1, ranks), float(self.tokens * top_k))
        seconds = cost.exchange_seconds(pairs_BLR, sends, np.full((1, ranks), float(self.tokens)))
        return float(seconds[self.way == "combine"].max())

    def microseconds(self) -> float:
        return 1e6 * self.seconds()

    def bandwidth(self) -> float:
        """GB/s as DeepEP counts: every node of a token, its own too; every rank, inside a node."""
        sends, deployment = self._sends(), self._deployment
        row = (
            deployment.dispatch_row_bytes
            if self.way == "dispatch"
            else deployment.combine_row_bytes
        )
        places = sends.nodes_per_token_L[0] * self.nodes / max(1, self.nodes - 1)
        if self.nodes == 1:
            places = sends.ranks_per_token_L[0]
        return float(self.tokens * places * row / self.seconds() / 1e9)

    @property
    def _deployment(self) -> Deployment:
        return Deployment(
            model=load_model("deepseek-v3"),
            topology=Topology(num_nodes=self.nodes, ranks_per_node=8, tensor_parallel_size=1),
            dispatcher=self.dispatcher,
        )

    def _sends(self) -> Sends:
        """Of 8 experts at random on at most `groups_per_token` of the nodes."""
        allowed, top_k = min(self.groups_per_token, self.nodes), 8
        nodes = allowed * (1 - (1 - 1 / allowed) ** top_k)
        ranks = 8 * allowed * (1 - (1 - 1 / (8 * allowed)) ** top_k)
        return Sends(
            nodes_per_token_L=np.array(nodes * (self.nodes - 1) / self.nodes),
            ranks_per_token_L=np.array(ranks),
        )


def ratio(*, of: Mapping[str, Any], to: Mapping[str, Any]) -> float:
    """Of two predictions, each given as its kind and its conditions."""
    top, bottom = (
        predict(side["kind"], {k: v for k, v in side.items() if k != "kind"}) for side in (of, to)
    )
    return top / bottom


def rank_imbalance(
    *, ranks: int, slots: int, tokens: int, balance: Balance, loads: skew.Loads = "recorded"
) -> float:
    """max / mean over ranks of the tokens of one layer of DeepSeek-V3's shape."""
    routing = Routing(
        num_experts=256,
        num_slots=slots,
        num_ranks=ranks,
        top_k=8,
        num_layers=58,
        tokens=tokens,
        balance=balance,
        skew=skew.decode(loads, known=False),
    )
    return imbalance(_drawn(routing), ranks)


def bound(*, tokens: int, destinations: int, bandwidth: float) -> float:
    """us of dispatch in FP8 and combine in BF16, one byte and two a channel, and nothing else."""
    link = Link(alpha_s=0.0, beta=bandwidth)
    hidden = load_model("deepseek-v3").hidden_size
    return 1e6 * float(link.seconds(float(tokens * destinations * hidden * (1 + 2))))


KINDS: dict[str, Callable[..., float]] = {
    "decode": lambda **conditions: Decode(**conditions)(),
    "prefill": lambda **conditions: Prefill(**conditions)(),
    "exchange": lambda **conditions: Exchange(**conditions).microseconds(),
    "bandwidth": lambda **conditions: Exchange(**conditions).bandwidth(),
    "ratio": ratio,
    "imbalance": rank_imbalance,
    "bound": bound,
}


def predict(kind: str, conditions: Mapping[str, Any]) -> float:
    """Raises ValueError for a kind or conditions that we do not know."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose from {', '.join(KINDS)}")
    try:
        return KINDS[kind](**conditions)
    except TypeError as error:
        raise ValueError(f"conditions of kind {kind!r}: {error}") from error


@cache
def _drawn(routing: Routing) -> IntArray:
    return routing.draw(np.random.default_rng(SEED), NUM_BATCHES)
