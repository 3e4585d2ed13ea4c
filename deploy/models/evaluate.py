"""What mosaic is worth: bits per byte, expert load by domain and layer, greedy completions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn
from transformers import DeepseekV3ForCausalLM

from deploy.models.architecture import gates
from deploy.models.corpus import DOMAINS
from deploy.models.greedy import continue_greedily

WINDOW, STRIDE = 1024, 512
WINDOWS_PER_BATCH = 16


def load_model(directory: Path, device: torch.device) -> DeepseekV3ForCausalLM:
    """The checkpoint as transformers loads it: BF16 on an accelerator, fp32 on the CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: DeepseekV3ForCausalLM = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=dtype)
    nn.Module.to(model, device)
    model.eval()
    return model


@torch.inference_mode()
def stream_bits(model: nn.Module, stream: NDArray[np.uint16], device: torch.device) -> float:
    """Summed bits of a token stream without its end marks, in windows of 1,024 tokens.

    Each window scores only the half that the window before did not, so every token but the first
    few has at least 512 tokens of context. The stream is read as if an end mark came first.
    """
    ids = torch.from_numpy(np.concatenate([[0], stream]).astype(np.int64))
    total = 0.0
    for inputs_NT, targets_NT in _windows(ids):
        logits_NTV = model(input_ids=inputs_NT.to(device), use_cache=False).logits
        loss_P = nn.functional.cross_entropy(
            logits_NTV.float().flatten(0, 1),
            targets_NT.to(device).flatten(),
            ignore_index=-100,
            reduction="sum",
        )
        total += float(loss_P)
    return total / float(np.log(2))


def _windows(ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of (inputs, targets); -100 where a target is scored elsewhere or ends a document."""
    targets = ids[1:].clone()
    targets[targets == 0] = -100
    rows = []
    for start in range(0, max(len(targets) - STRIDE, 1), STRIDE):
        goal = targets[start : start + WINDOW].clone()
        if start:
            goal[:STRIDE] = -100
        given = ids[start : start + len(goal)]
        pad = WINDOW - len(goal)
        rows.append(
            (nn.functional.pad(given, (0, pad)), nn.functional.pad(goal, (0, pad), value=-100))
        )
    for first in range(0, len(rows), WINDOWS_PER_BATCH):
        batch = rows[first : first + WINDOWS_PER_BATCH]
        yield torch.stack([row[0] for row in batch]), torch.stack([row[1] for row in batch])


class LoadCounter:
    """Counts, while its context is open, how often each MoE layer chooses each expert."""

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        self.counts: dict[int, NDArray[np.int64]] = {}
        self._gates = gates(model)
        self._handles: list[Any] = []

    def __enter__(self) -> "LoadCounter":
        for layer, gate in self._gates.items():
            num_experts = len(gate.e_score_correction_bias)
            self.counts[layer] = np.zeros(num_experts, dtype=np.int64)
            self._handles.append(gate.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(self, *_exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Any:
        def count(_gate: nn.Module, _args: object, output: tuple[torch.Tensor, ...]) -> None:
            counts = self.counts[layer]
            counts += np.bincount(output[2].flatten().cpu().numpy(), minlength=len(counts))

        return count


def evaluate_split(
    model: DeepseekV3ForCausalLM, directory: Path, split: str, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Per domain: bytes, tokens, bits_per_byte, and expert_load {layer: [counts]}."""
    streams = np.load(directory / "tokens.npz")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    sizes = token_bytes(tokenizer)
    result: dict[str, dict[str, Any]] = {}
    for domain in DOMAINS:
        stream = streams[f"{split}_{domain}"]
        with LoadCounter(model) as load:
            bits = stream_bits(model, stream, device)
        num_bytes = int(sizes[stream].sum())
        result[domain] = {
            "bytes": num_bytes,
            "tokens": int((stream != 0).sum()),
            "bits_per_byte": bits / num_bytes,
            "expert_load": {str(layer): count.tolist() for layer, count in load.counts.items()},
        }
    return result


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes behind each token id; 0 for the end mark. A byte-level token has one mark per byte."""
    sizes = [len(tokenizer.id_to_token(idx) or "") for idx in range(tokenizer.get_vocab_size())]
    sizes[0] = 0
    return np.array(sizes, dtype=np.int64)


def complete(
    model: DeepseekV3ForCausalLM, tokenizer: Tokenizer, prompt: str, num_tokens: int
) -> str:
    """The greedy continuation of `prompt`, up to `num_tokens` or the end of text."""
    prompt_NL = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
    ids = continue_greedily(model, prompt_NL, num_tokens)[0, prompt_NL.shape[1] :].tolist()
    return str(tokenizer.decode(ids[: ids.index(0)] if 0 in ids else ids))
