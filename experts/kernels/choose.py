"""From router logits to experts, slots, weights and ranges in one launch: `router/gate.py` on a GPU.

One warp has a token. Its experts' scores become 64-bit keys, the score's bits above and the expert's
number, reversed, below: no two are equal, the greatest is the best expert with the lower id first among
equals, NaN above all numbers as torch sorts. So the best K are K maxima and nothing else is compared.

What a step needs besides comes from the same pass: the slot that each chosen expert's copy has (a table,
`router/placement.py`), how often each expert was chosen (counted by integer atomics, whose total does
not depend on their order), and the range of combine "fixed" (`experts/gains.py`).

Equal to the CPU's except for what `exp` is: the GPU's is within 2 units in the last place, so weights
differ in the last bits and experts where two scores are that close.

T tokens, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from experts.gains import MARGIN
from experts.kernels.choose_kernel import choose_experts
from experts.kernels.early import early
from router.gate import GateConfig


@dataclass(frozen=True, kw_only=True)
class Choice:
    """ids_TK int64 and weights_TK fp32, best first; slots_TK int32 and range_T fp32 if asked for.

    Tokens beyond the number of real ones have ids and slots -1 and weights 0.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    slots_TK: Tensor | None
    range_T: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What outlives a step: chosen_E int64 is added to; recent_MK int64 gets the first M tokens' ids.

    recent_MK is -1 where the step had fewer.
    """

    chosen_E: Tensor
    recent_MK: Tensor


def choose(
    logits_TE: Tensor, config: GateConfig, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(ids_TK int64, weights_TK fp32) of fp32 logits, as `Gate.choose`."""
    choice = choose_slots(logits_TE, config, bias_E)
    return choice.ids_TK, choice.weights_TK


def choose_slots(
    logits_TE: Tensor,
    config: GateConfig,
    bias_E: Tensor | None = None,
    *,
    num_tokens: Tensor | None = None,
    table_E: Tensor | None = None,
    gains_E: Tensor | None = None,
    tally: Tally | None = None,
) -> Choice:
    """`choose`, and the rest of it. Logits may also be [P, T, E]: parts to be added in order.

    num_tokens: int32 [1], on the device: how many of the rows are tokens (None: all). table_E: int32
    slot of each expert, -1 = none. gains_E: fp32. Raises ValueError for logits of another shape.
    """
    num_parts = logits_TE.shape[0] if logits_TE.dim() == 3 else 1
    num_rows, num_experts = logits_TE.shape[-2:]
    if num_experts != config.num_experts or logits_TE.dtype != torch.float32:
        raise ValueError(
            f"logits {logits_TE.dtype} {list(logits_TE.shape)} are not fp32 "
            f"[T, num_experts({config.num_experts})]"
        )
    num_topk, device = config.num_experts_per_token, logits_TE.device
    ids_TK = torch.empty((num_rows, num_topk), dtype=torch.int64, device=device)
    weights_TK = torch.empty((num_rows, num_topk), dtype=torch.float32, device=device)
    slots_TK = None if table_E is None else torch.empty_like(ids_TK, dtype=torch.int32)
    range_T = None if gains_E is None else torch.empty_like(weights_TK[:, 0])
    most = 0 if tally is None else len(tally.recent_MK)
    if num_rows or most:
        unused = weights_TK  # never looked at; a kernel's arguments are all there
        choose_experts[(max(num_rows, most),)](
            logits_TE.contiguous(),
            unused if bias_E is None else bias_E, unused if num_tokens is None else num_tokens,
            unused if table_E is None else table_E, unused if gains_E is None else gains_E,
            ids_TK, weights_TK, unused if slots_TK is None else slots_TK,
            unused if range_T is None else range_T,
            unused if tally is None else tally.chosen_E, unused if tally is None else tally.recent_MK,
            num_rows, PARTS=num_parts,
            E=num_experts, E_PAD=triton.next_power_of_2(num_experts // config.num_groups),
            G=config.num_groups, G_PAD=triton.next_power_of_2(config.num_groups),
            KEPT=config.num_groups_per_token,
            K=num_topk, K_PAD=triton.next_power_of_2(num_topk),
            SIGMOID=config.scoring == "sigmoid", TOP2=config.group_score == "top2_sum",
            RENORMALIZE=config.renormalize, SCALING=config.scaling_factor, MARGIN=MARGIN,
            BIAS=bias_E is not None,
            COUNTED=num_tokens is not None, SLOTS=table_E is not None,
            RANGE=gains_E is not None, TALLY=tally is not None, MOST=most,
            num_warps=1, enable_fp_fusion=False, **early(device),
        )  # fmt: skip
    return Choice(ids_TK=ids_TK, weights_TK=weights_TK, slots_TK=slots_TK, range_T=range_T)
