"""How unequal experts' mean loads are, from recordings; nothing here has seen a target's figure.

"recorded": DeepSeek-V2-Lite's, what every blind prediction uses. "attached": DeepSeek-V3/R1's own,
as SGLang's authors attached them to the launch commands of the runs that are S6 to S8
(sgl-project/sglang#6017, "attachment_ep_statistics", kept in GeneratedRandomly/SGLang-reproduce):
tokens by layer and expert, 58 x 256 a table, inputs of EPLB. No throughput is in them, but they are
of those runs: predictions with them stand apart, in no statistics of blind ones.

L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Loads = Literal["recorded", "attached"]

INDEX_OFFSET = 4
"""Of 0.5, 4, 16 and 64 the one that gives seven attached tables best: max / mean of 32 ranks of 8
neighbouring experts (2.29 to 3.04) within 6 %, and under EPLB's plan on 4 nodes (1.17 to 1.34)
within 3 %. Lognormals alone are 20 to 40 % low in the first: V3's load falls with the expert's
index."""


@dataclass(frozen=True, kw_only=True)
class Skew:
    """Mean load of expert e: (e + INDEX_OFFSET)^-slope, times a lognormal of log-sd `spread`; both
    given as (mean, sd) over layers."""

    spread: tuple[float, float]
    slope: tuple[float, float] = (0.0, 0.0)

    def loads(self, rng: np.random.Generator, num_layers: int, num_experts: int) -> FloatArray:
        """[L, E] of any sum. Where nothing falls, nothing more is drawn."""
        spread_L = np.maximum(rng.normal(*self.spread, size=num_layers), 0.0)
        log_LE = spread_L[:, None] * rng.standard_normal((num_layers, num_experts))
        if self.slope == (0.0, 0.0):
            return np.exp(log_LE)
        slope_L = rng.normal(*self.slope, size=num_layers)
        return np.exp(log_LE - slope_L[:, None] * np.log(np.arange(num_experts) + INDEX_OFFSET))


RECORDED = Skew(spread=(0.673, 0.105))
"""Mean and sd over the 26 layers and two tasks of the routing of DeepSeek-V2-Lite that
deepseek-ai/ESFT publishes, from the loads' coefficient of variation less what 8,000 tokens scatter
by chance."""

# Attached tables. Slope: least squares on the logarithms; spread: from the coefficient of variation
# of what the slope leaves, less what as many tokens scatter by chance.
PREFILL = {  # by the length of prompts; 8.4 million tokens each
    1024: Skew(slope=(0.277, 0.165), spread=(0.654, 0.114)),
    2048: Skew(slope=(0.330, 0.198), spread=(0.692, 0.119)),
    4096: Skew(slope=(0.387, 0.238), spread=(0.718, 0.131)),
}
DECODE = Skew(slope=(0.349, 0.190), spread=(0.581, 0.097))
"""Prompts of 2000 tokens, 100 tokens decoded: 3.0 million."""
ANY_DECODE = Skew(slope=(0.364, 0.172), spread=(0.535, 0.097))
"""Mean of the four tables of decode, for a run whose data are not known."""


def prefill(loads: Loads, prompt: int) -> Skew:
    """Of prompts of the nearest length."""
    nearest = min(PREFILL, key=lambda length: abs(np.log(length / prompt)))
    return PREFILL[nearest] if loads == "attached" else RECORDED


def decode(loads: Loads, known: bool = True) -> Skew:
    """known: that its data are SGLang's."""
    attached = DECODE if known else ANY_DECODE
    return attached if loads == "attached" else RECORDED
