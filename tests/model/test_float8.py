"""FP8 dispatch against transformers in fp32: within the error that e4m3 must cause, and not below.

e4m3 keeps 3 mantissa bits: a value with significand s in [1, 2) is rounded by an error uniform in
+-2^-4, so its relative rms is 2^-3 / sqrt(12) * sqrt(E[s^-2]) = 0.0265 for log-uniform s. An expert
multiplies two functions of its quantised input, the activated gate (silu's relative slope is below
1.7 where it matters) and the up projection: 0.0265 * sqrt(1.7^2 + 1) < 2 * 0.0265. Errors of L expert
layers are independent and add in quadrature; the routed output is at most the whole residual
stream, and the norm and the output projection keep relative errors. Hence 2 * 0.0265 * sqrt(L).

A gate of a later layer may decide a near-tie differently, which replaces one expert's share of the
output by another's: up to sqrt(2) / 2 for two experts of equal weight. Few rows, still bounded.
"""

import pytest
import torch

from cluster.model.config import ModelConfig
from comms.topology import Topology
from tests.model.ranks import Options, serve

E4M3_RELATIVE_RMS = 0.0265
MAX_AFTER_A_CHANGED_CHOICE = 2**0.5 / 2


@pytest.mark.parametrize(
    "name", ["deepseek_v2_grouped", "deepseek_v3_qlora", "qwen3_moe_norm", "mixtral", "mosaic"]
)
def test_error_is_that_of_e4m3(rank_pool, checkpoint_dir, reference, name):
    answers = reference(name)
    results = rank_pool.run(
        serve,
        Topology(num_nodes=2, ranks_per_node=2),
        checkpoint_dir(name),
        Options(dispatch_dtype="float8"),
        [answer.prompt for answer in answers],
        1,
        timeout_s=120,
    )
    logits = {i: rows for served in results for i, rows in served.logits.items()}
    error = torch.cat(
        [
            (logits[i] - answer.logits).norm(dim=1) / answer.logits.norm(dim=1)
            for i, answer in enumerate(answers)
        ]
    )
    num_layers = ModelConfig.from_dir(checkpoint_dir(name)).num_moe_layers
    assert float(error.quantile(0.9)) < 2 * E4M3_RELATIVE_RMS * num_layers**0.5
    assert float(error.max()) < MAX_AFTER_A_CHANGED_CHOICE
    assert float(error.median()) > E4M3_RELATIVE_RMS / 10, "rows cannot have travelled in FP8"
