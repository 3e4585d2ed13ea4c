"""A calibration with round numbers and no tables, that no measurement will change."""

import copy
import json
from typing import Any

from simulations.hardware.calibration import Calibration

ROUND: dict[str, Any] = {
    "version": 1,
    "name": "round",
    "provenance": {"hardware": "none", "date": "2026-01-01", "source": "made up"},
    "memory_bytes": 80e9,
    "memory_bandwidth": 2e12,
    "peak_flops": {"bfloat16": 5e14, "float8": 1e15},
    "gemm": {
        "bfloat16": {"overhead_s": 2e-6, "tile": 32},
        "float8": {"overhead_s": 3e-6, "tile": 64},
    },
    "attention": {"decode_flops": 4e14, "prefill_flops": 3e14, "overhead_s": 5e-6},
    "links": {
        "node": {"alpha_s": 1e-5, "beta": 1e11},
        "network": {"alpha_s": 2e-5, "beta": 4e10},
    },
    "combine": {"network": {"alpha_s": 3e-5, "beta": 5e10}},
    "overheads": {"step_s": 1e-3, "layer_s": 1e-6},
    "overlap": {"sm_share": 0.2, "supports_two_batch": True},
    "range": {"tokens": [1, 4096], "context": [1, 32768], "ranks": [1, 256]},
}


def calibration(**changes: Any) -> Calibration:
    """ROUND with top-level keys replaced."""
    values = {**copy.deepcopy(ROUND), **changes}
    return Calibration.from_json(json.dumps(values), "round.json")
