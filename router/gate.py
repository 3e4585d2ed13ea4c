"""The gate: router logits to the top-k experts of each token and their weights.

One formula covers the supported models; they differ in its parameters only:

    DeepSeek-V3          sigmoid, correction bias, groups scored by their top-2 sum, renormalised
    DeepSeek-V2          softmax, greedy (one group) or groups scored by their maximum
    Qwen3-MoE            softmax, renormalised if `norm_topk_prob`
    Mixtral              softmax, renormalised (equal to a softmax over the top-k logits)

Every step works on one row at a time in fp32, so a token's choice does not depend on its batch.
Equal scores go to the lower expert id. The projection to logits is the caller's: it must be
row-stable too, and the router does not know how.

T tokens, H hidden, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Linear = Callable[[Tensor, Tensor], Tensor]
"""(x_TH, weight_EH) -> logits_TE, fp32 in and out."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How scores become a choice. `num_groups` = 1 means no group limit.

    The correction bias (added for the choice, not in the weights) belongs to the Gate.
    """

    num_experts: int
    num_experts_per_token: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    num_groups_per_token: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    renormalize: bool = False
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        experts, groups = self.num_experts, self.num_groups
        if min(experts, groups, self.num_experts_per_token, self.num_groups_per_token) < 1:
            raise ValueError(f"Invalid gate: every count must be at least 1: {self}")
        if experts % groups:
            raise ValueError(
                f"Invalid gate: num_experts({experts}) % num_groups({groups}) = {experts % groups}"
                ", expected 0"
            )
        if self.num_groups_per_token > groups:
            raise ValueError(
                f"Invalid gate: num_groups_per_token({self.num_groups_per_token}) > "
                f"num_groups({groups})"
            )
        selectable = experts // groups * self.num_groups_per_token
        if self.num_experts_per_token > selectable:
            raise ValueError(
                f"Invalid gate: num_experts_per_token({self.num_experts_per_token}) > "
                f"num_experts({experts}) / num_groups({groups}) * "
                f"num_groups_per_token({self.num_groups_per_token}) = {selectable}"
            )
        if self.group_score == "top2_sum" and groups > 1 and experts // groups < 2:
            raise ValueError(
                f"Invalid gate: top2_sum needs 2 experts a group; num_experts({experts}) / "
                f"num_groups({groups}) = {experts // groups}"
            )


class Gate:
    """Scores tokens against experts and picks each token's top k.

    weight_EH and correction_bias_E are kept in fp32. Raises ValueError on wrong shapes.
    """

    def __init__(
        self, config: GateConfig, weight_EH: Tensor, correction_bias_E: Tensor | None = None
    ) -> None:
        if weight_EH.dim() != 2 or weight_EH.shape[0] != config.num_experts:
            raise ValueError(
                f"Gate weight {list(weight_EH.shape)} is not "
                f"[num_experts({config.num_experts}), hidden]"
            )
        if correction_bias_E is not None and correction_bias_E.shape != (config.num_experts,):
            raise ValueError(
                f"Correction bias {list(correction_bias_E.shape)} is not "
                f"[num_experts({config.num_experts})]"
            )
        self.config = config
        self.weight_EH = weight_EH.float()
        self.correction_bias_E = None if correction_bias_E is None else correction_bias_E.float()

    def __call__(self, x_TH: Tensor, linear: Linear) -> tuple[Tensor, Tensor]:
        """(ids_TK int64, weights_TK fp32) for x_TH of any floating dtype; best expert first."""
        return self.choose(linear(x_TH.float(), self.weight_EH))

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(ids_TK int64, weights_TK fp32) from router logits; best expert first."""
        config = self.config
        scores_TE = _scores(logits_TE.float(), config.scoring)
        choice_TE = scores_TE
        if self.correction_bias_E is not None:
            choice_TE = scores_TE + self.correction_bias_E
        if config.num_groups > 1:
            choice_TE = _keep_best_groups(choice_TE, config)
        ids_TK = _top_k(choice_TE, config.num_experts_per_token)
        weights_TK = scores_TE.gather(1, ids_TK)
        if config.renormalize:
            # 1e-20: DeepSeek-V3's guard; adding it changes no other model's fp32 sum.
            weights_TK = weights_TK / (weights_TK.sum(dim=1, keepdim=True) + 1e-20)
        return ids_TK, weights_TK * config.scaling_factor


def _scores(logits_TE: Tensor, scoring: Literal["softmax", "sigmoid"]) -> Tensor:
    if scoring == "softmax":
        return logits_TE.softmax(dim=1)
    # torch.sigmoid computes the last elements of a tensor, short of a vector, by another formula:
    # a token's bits would depend on where in the batch it stands. torch.exp does not.
    return 1 / (1 + torch.exp(-logits_TE))


def _keep_best_groups(choice_TE: Tensor, config: GateConfig) -> Tensor:
    """choice_TE with -inf outside each token's best groups."""
    grouped_TGE = choice_TE.view(
        len(choice_TE), config.num_groups, config.num_experts // config.num_groups
    )
    if config.group_score == "max":
        group_score_TG = grouped_TGE.amax(dim=2)
    else:
        group_score_TG = grouped_TGE.topk(2, dim=2).values.sum(dim=2)
    groups_TG = _top_k(group_score_TG, config.num_groups_per_token)
    dropped_TG = torch.ones_like(group_score_TG, dtype=torch.bool).scatter_(1, groups_TG, False)
    return grouped_TGE.masked_fill(dropped_TG.unsqueeze(2), float("-inf")).view_as(choice_TE)


def _top_k(scores: Tensor, k: int) -> Tensor:
    """Column ids of the k largest of each row, descending, the lower id first among equals."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k].contiguous()
