"""How much work each operation of a model is: parameters, FLOP and bytes, on one rank.

A multiplication and an addition are two FLOP. Tensor parallelism of size t divides heads, the
channels of dense MLPs and the vocabulary; MLA's down-projections, gates and shared experts are
whole on every rank (`cluster/model/loader.py`).

For DeepSeek-V3 these functions give 671.0e9 parameters of which 36.6e9 work on a token (the output
head counted, the embedding not), 142.8e9 FLOP for a token decoded at a context of 4096, 81.6e9 for
one of a prompt of 4096 (head not counted), and 70,272 bytes of bfloat16 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.model.config import GqaConfig, MlaConfig, ModelConfig
from cluster.model.kv_cache import local_kv_heads


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """`count` products [M, k] x [k, n] with weights of their own, M the rows of a step."""

    n: int
    k: int
    count: int = 1

    @property
    def params(self) -> int:
        return self.count * self.n * self.k

    @property
    def flop_per_row(self) -> int:
        return 2 * self.params

    @property
    def values_per_row(self) -> int:
        """Elements read and written, besides the weights."""
        return self.count * (self.n + self.k)


@dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """One layer's attention on one rank.

    before, after: projections before the core and after it. In MLA's absorbed form (decode) the
        maps from the latent to keys and values work on the query and the output.
    before_prefill, after_prefill: in the plain form (prompts) one product expands the latent of
        every new token, which is as many FLOP.
    flop_per_pair: of one (query, key) pair in the core, all heads of the rank.
    values_per_key: elements of the cache that a key and its value are.
    """

    before: tuple[Gemm, ...]
    after: tuple[Gemm, ...]
    before_prefill: tuple[Gemm, ...]
    after_prefill: tuple[Gemm, ...]
    flop_per_pair_decode: int
    flop_per_pair_prefill: int
    values_per_key: int

    @property
    def params(self) -> int:
        return sum(gemm.params for gemm in (*self.before, *self.after))


def attention(model: ModelConfig, tensor_parallel_size: int = 1) -> AttentionWork:
    if isinstance(model.attention, GqaConfig):
        return _gqa(model.attention, model.hidden_size, tensor_parallel_size)
    return _mla(model.attention, model.hidden_size, tensor_parallel_size)


def gated_mlp(hidden: int, intermediate: int) -> tuple[Gemm, Gemm]:
    """Gate and up in one product, then down."""
    return Gemm(n=2 * intermediate, k=hidden), Gemm(n=hidden, k=intermediate)


def dense_mlp(model: ModelConfig, tensor_parallel_size: int = 1) -> tuple[Gemm, ...]:
    """A layer without experts, on the fullest rank of the group."""
    return gated_mlp(model.hidden_size, -(-model.dense_intermediate_size // tensor_parallel_size))


def shared_expert(model: ModelConfig) -> tuple[Gemm, ...]:
    size = model.shared_intermediate_size
    return gated_mlp(model.hidden_size, size) if size else ()


def routed_expert(model: ModelConfig) -> tuple[Gemm, Gemm]:
    return gated_mlp(model.hidden_size, model.expert_intermediate_size)


def gate(model: ModelConfig) -> Gemm:
    return Gemm(n=model.num_experts, k=model.hidden_size)


def head(model: ModelConfig, tensor_parallel_size: int = 1) -> Gemm:
    """On the rank with the most of the vocabulary."""
    return Gemm(n=-(-model.vocab_size // tensor_parallel_size), k=model.hidden_size)


def total_params(model: ModelConfig) -> int:
    """All weights but norms."""
    return _params(model, model.num_experts) + model.vocab_size * model.hidden_size * (
        not model.tie_word_embeddings
    )


def active_params(model: ModelConfig) -> int:
    """Weights that work on one token: the output head, not the embedding."""
    return _params(model, model.gate.num_experts_per_token)


def decode_flop(model: ModelConfig, context: int) -> float:
    """Of one token that attends to `context` keys, itself included."""
    core = attention(model).flop_per_pair_decode * context * model.num_layers
    return 2.0 * active_params(model) + core


def prefill_flop(model: ModelConfig, prompt: int) -> float:
    """Of a prompt's token, mean over the prompt; (prompt + 1) / 2 keys each. Without the head."""
    core = attention(model).flop_per_pair_prefill * (prompt + 1) / 2 * model.num_layers
    return 2.0 * (active_params(model) - head(model).params) + core


def _params(model: ModelConfig, num_experts: int) -> int:
    """Layers with so many routed experts each, and the output head."""
    expert_layer = gate(model).params + _sum(shared_expert(model))
    expert_layer += num_experts * _sum(routed_expert(model))
    num_dense = model.num_layers - model.num_moe_layers
    return (
        model.num_layers * attention(model).params
        + model.num_moe_layers * expert_layer
        + num_dense * _sum(dense_mlp(model))
        + head(model).params
    )


def _sum(gemms: tuple[Gemm, ...]) -> int:
    return sum(gemm.params for gemm in gemms)


def _mla(config: MlaConfig, hidden: int, size: int) -> AttentionWork:
    heads, latent, rotary = config.num_heads // size, config.kv_lora_rank, config.qk_rope_head_dim
    query = heads * (config.qk_nope_head_dim + rotary)
    down: tuple[Gemm, ...]
    if config.q_lora_rank:
        down = (
            Gemm(n=config.q_lora_rank + latent + rotary, k=hidden),
            Gemm(n=query, k=config.q_lora_rank),
        )
    else:
        down = (Gemm(n=query + latent + rotary, k=hidden),)
    per_head = config.qk_nope_head_dim + rotary + config.v_head_dim
    output = Gemm(n=hidden, k=heads * config.v_head_dim)
    expanded = Gemm(n=heads * (config.qk_nope_head_dim + config.v_head_dim), k=latent)
    return AttentionWork(
        before=(*down, Gemm(n=latent, k=config.qk_nope_head_dim, count=heads)),
        after=(Gemm(n=config.v_head_dim, k=latent, count=heads), output),
        before_prefill=(*down, expanded),
        after_prefill=(output,),
        flop_per_pair_decode=2 * heads * (2 * latent + rotary),
        flop_per_pair_prefill=2 * heads * per_head,
        values_per_key=latent + rotary,
    )


def _gqa(config: GqaConfig, hidden: int, size: int) -> AttentionWork:
    heads, kv_heads = config.num_heads // size, local_kv_heads(config.num_kv_heads, size)
    per_pair = 4 * heads * config.head_dim
    before = (Gemm(n=(heads + 2 * kv_heads) * config.head_dim, k=hidden),)
    after = (Gemm(n=hidden, k=heads * config.head_dim),)
    return AttentionWork(
        before=before,
        after=after,
        before_prefill=before,
        after_prefill=after,
        flop_per_pair_decode=per_pair,
        flop_per_pair_prefill=per_pair,
        values_per_key=2 * kv_heads * config.head_dim,
    )
