"""What transformers says: prefill logits and greedy tokens of a few prompts, in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NUM_TOKENS = 64
PROMPT_LENGTHS = (7, 33, 90)


@dataclass(frozen=True)
class Answer:
    prompt: list[int]
    logits: Tensor
    tokens: list[int]


def random_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


def reference_answers(directory: Path) -> list[Answer]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    answers = []
    for prompt in random_prompts(model.config.vocab_size):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            logits = model(ids).logits[0].clone()
            generated = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=NUM_TOKENS,
                max_new_tokens=NUM_TOKENS,
                pad_token_id=0,
                eos_token_id=-1,
            )
        answers.append(Answer(prompt, logits, generated[0, len(prompt) :].tolist()))
    return answers
