"""Where the model would run: logits are a hash of all tokens before them, read from a paged cache.

As `tests/engine/fake_model.py`, for a real leader: a wrong block, start or row changes the tokens.
"""

import zlib
from types import SimpleNamespace

import numpy as np
import torch

from cluster.config import ServeConfig
from cluster.engine.plan import Logits, StepPlan
from cluster.engine.runner import Runner
from cluster.engine.step_timer import StepTimer


class HashRunner(Runner):
    """One hidden layer of experts, of which each token goes to two.

    Every 64th row is not finite, but for prompts that begin with token 5.
    """

    def __init__(self, config: ServeConfig, num_blocks: int, vocab_size: int) -> None:
        migrator = SimpleNamespace(epoch=0, preparing=False, commit=lambda epoch: False)
        super().__init__(config, None, None, StepTimer(), migrator, None)
        self._block_size = config.cache.block_size
        self._vocab_size = vocab_size
        self._cache: dict[int, int] = {}
        self.num_blocks = num_blocks

    def execute(
        self, plan: StepPlan, max_tokens: int | None = None, max_blocks: int = 0
    ) -> torch.Tensor:
        assert plan.num_tokens <= self.config.scheduler.max_num_batched_tokens
        self.num_steps += 1
        rows = []
        for item in plan.items:
            slots = [
                item.block_table[p // self._block_size] * self._block_size + p % self._block_size
                for p in range(item.start + len(item.token_ids))
            ]
            assert max(slots) < self.num_blocks * self._block_size
            self._cache.update(zip(slots[item.start :], item.token_ids, strict=True))
            first = item.start if item.logits == Logits.ALL else len(slots) - 1
            for end in range(first, len(slots)) if item.logits else ():
                rows.append(self._logits([self._cache[slot] for slot in slots[: end + 1]]))
        self.routed_TLK = torch.zeros(plan.num_tokens, 1, 2, dtype=torch.int16)
        return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(-1, self._vocab_size))

    def _logits(self, prefix: list[int]) -> np.ndarray:
        seed = zlib.crc32(repr(prefix).encode())
        if seed % 64 == 0 and prefix[0] != 5:
            return np.full(self._vocab_size, np.nan, dtype=np.float32)
        return np.random.default_rng(seed).standard_normal(self._vocab_size, dtype=np.float32)
