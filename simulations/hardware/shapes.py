"""Which matrix products a model's layers are made of."""

from __future__ import annotations

from cluster.model.config import ModelConfig
from simulations import arithmetic


def product_shapes(model: ModelConfig, tensor_parallel_size: int = 1) -> list[tuple[int, int]]:
    """[n, k] of every product of a whole weight with a step's rows, on one rank."""
    size = tensor_parallel_size
    work = arithmetic.attention(model, size)
    gemms = [*work.before, *work.before_prefill, *work.after, *arithmetic.dense_mlp(model, size)]
    gemms += [*arithmetic.shared_expert(model), arithmetic.gate(model)]
    gemms.append(arithmetic.head(model, size))
    return sorted({(gemm.n, gemm.k) for gemm in gemms if gemm.count == 1 and gemm.params})
