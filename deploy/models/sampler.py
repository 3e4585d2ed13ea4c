"""What one training run is told, and where its batches come from: random windows by domain."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from deploy.models.corpus import DOMAINS

LENGTHS = (512, 1024, 512, 2048)  # sequence lengths in turn, the batch's tokens staying the same


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Rates are per optimiser step; `minutes` caps the schedule in wall time."""

    steps: int = 8000
    minutes: float = 8.7
    batch_tokens: int = 32768
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    dropout: float = 0.1
    balance_step: float = 1e-3
    balance_band: float = 0.5
    balance_until: float = 0.9  # the gates' biases are frozen for the last tenth
    english: float = 0.30
    chinese: float = 0.30
    python: float = 0.25
    arithmetic: float = 0.15
    loop_rows: int = 16  # rows of LOOP_LENGTH tokens for the loss against loops
    loop_weight: float = 1.0
    loop_from: float = 0.3  # share of the run after which that loss joins
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_tokens % max(LENGTHS):
            raise ValueError(f"batch_tokens {self.batch_tokens} is no multiple of {max(LENGTHS)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class WindowSampler:
    """Random windows of the training streams, domains drawn by weight, all on the device."""

    def __init__(self, directory: Path, config: TrainConfig, device: torch.device) -> None:
        arrays = np.load(directory / "tokens.npz")
        streams = [torch.from_numpy(arrays[f"train_{d}"].astype(np.int32)) for d in DOMAINS]
        sizes = [len(stream) for stream in streams]
        self.tokens = torch.cat(streams).to(device)
        self.starts = torch.tensor(np.cumsum([0, *sizes[:-1]]), device=device)
        self.sizes = torch.tensor(sizes, device=device)
        self.weights = torch.tensor([getattr(config, d) for d in DOMAINS], device=device)
        self.generator = torch.Generator(device).manual_seed(config.seed)

    def batch(self, num_rows: int, length: int) -> torch.Tensor:
        """[num_rows, length + 1] token ids."""
        return self.prompts(num_rows, length + 1)[0]

    def prompts(self, num_rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_rows, length] token ids and the domain index of each row."""
        device = self.tokens.device
        domain_N = torch.multinomial(self.weights, num_rows, True, generator=self.generator)
        place_N = torch.rand(num_rows, device=device, generator=self.generator)
        start_N = self.starts[domain_N] + (place_N * (self.sizes[domain_N] - length)).long()
        ids_NT = self.tokens[start_N[:, None] + torch.arange(length, device=device)].long()
        return ids_NT, domain_N
