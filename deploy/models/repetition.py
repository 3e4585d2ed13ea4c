"""Teaches the model that a loop should fade, so that greedy text does not get stuck in one.

The method is DITTO (Xu et al., "Learning to Break the Loop", NeurIPS 2022): repeat a stretch of
real text over and over, and ask that every token's probability in one round be `DECAY` times its
probability in the round before. Left alone, small models do the opposite: each round makes the
next more likely.
"""

import torch
from torch import nn

DECAY = 0.5
SHORTEST, LONGEST = 2, 64  # tokens in one round
EARLIEST, LATEST = 16, 160  # tokens of untouched text before the first round


def looped_rows(
    ids_NT: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Real rows turned into prefix + endless loop: (ids_NT, period_N, first repeated index_N)."""
    num_rows, length = ids_NT.shape
    device = ids_NT.device
    draw_N = torch.rand(num_rows, device=device, generator=generator)
    period_N = (SHORTEST * (LONGEST / SHORTEST) ** draw_N).long()
    begin_N = torch.randint(EARLIEST, LATEST, (num_rows,), device=device, generator=generator)
    place_T = torch.arange(length, device=device)
    source_NT = begin_N[:, None] + (place_T - begin_N[:, None]) % period_N[:, None]
    source_NT = torch.where(place_T < begin_N[:, None], place_T, source_NT)
    return ids_NT.gather(1, source_NT), period_N, begin_N + period_N


def fading_loss(
    logits_NTV: torch.Tensor, ids_NT: torch.Tensor, period_N: torch.Tensor, first_N: torch.Tensor
) -> torch.Tensor:
    """-log(1 - |p(token) - DECAY * p(same token, one round earlier)|), averaged over the loop.

    `logits_NTV[:, t]` predicts `ids_NT[:, t + 1]`; the earlier probability takes no gradient.
    """
    target_NT = ids_NT[:, 1:]
    log_p_NT = nn.functional.log_softmax(logits_NTV, dim=-1).gather(2, target_NT[..., None])
    p_NT = log_p_NT.squeeze(-1).exp()
    place_T = torch.arange(1, ids_NT.shape[1], device=ids_NT.device)
    # Place t of `p_NT` belongs to token t + 1; `earlier` is the same token one round before.
    earlier_NT = (place_T - 1 - period_N[:, None]).clamp(min=0)
    wanted_NT = DECAY * p_NT.detach().gather(1, earlier_NT)
    looped_NT = place_T >= first_N[:, None]
    loss_NT = -torch.log1p(-(p_NT - wanted_NT).abs().clamp(max=1 - 1e-4))
    return (loss_NT * looped_NT).sum() / looped_NT.sum()
