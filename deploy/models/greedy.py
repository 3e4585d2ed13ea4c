"""Greedy continuation in batches, and how much of it merely repeats itself.

Shape suffixes: N rows, L tokens of prompt and continuation.
"""

import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM, DynamicCache

from deploy.models.corpus import DOMAINS

# A repeat is an n-gram seen before in the row. Python repeats itself by nature, and arithmetic
# does in all but its numbers: there only a whole problem told twice counts.
REPEAT_TOKENS = {"english": 5, "chinese": 6, "python": 8, "arithmetic": 20}


@torch.inference_mode()
def continue_greedily(
    model: DeepseekV3ForCausalLM, prompt_NL: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """Prompt and greedy continuation in one tensor, running on past the end of text."""
    cache = DynamicCache(config=model.config)
    parts, step_NL = [prompt_NL], prompt_NL
    for _ in range(num_tokens):
        output = model(input_ids=step_NL, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step_NL = output.logits[:, -1:].argmax(dim=-1)
        parts.append(step_NL)
    return torch.cat(parts, dim=1)


def repeats(ids_NL: torch.Tensor, domain_N: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """True where a generated token completes an n-gram that its row held before."""
    length = ids_NL.shape[1]
    same_NLL = ids_NL[:, :, None] == ids_NL[:, None, :]
    before_LL = torch.ones(length, length, dtype=torch.bool, device=ids_NL.device).tril(-1)
    run_NLL = same_NLL & before_LL
    repeated_NL = torch.zeros_like(ids_NL, dtype=torch.bool)
    for size in range(1, max(REPEAT_TOKENS.values()) + 1):
        if size > 1:  # a run of `size` ends here if one of `size - 1` ended a place before
            shifted_NLL = nn.functional.pad(run_NLL[:, :-1, :-1], (1, 0, 1, 0))
            run_NLL = same_NLL & before_LL & shifted_NLL
        for idx, domain in enumerate(DOMAINS):
            if REPEAT_TOKENS[domain] == size:
                rows_N = domain_N == idx
                repeated_NL[rows_N] = run_NLL[rows_N].any(dim=2)
    repeated_NL[:, :prompt_length] = False
    ended_NL = (ids_NL == 0) & (torch.arange(length, device=ids_NL.device) >= prompt_length)
    return repeated_NL & (ended_NL.cumsum(1) == 0)
