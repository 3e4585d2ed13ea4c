"""What our layers do besides products, experts and attention's core: norms, rotation, gate.

Legend: T tokens, H hidden, E experts, N heads, D channels of a key, Q of the query's down-projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.model.config import MlaConfig, ModelConfig
from cluster.model.cuda import fused
from cluster.model.cuda.kernel_ops import KernelOps
from cluster.model.cuda.mla import STORED_ASIDE
from cluster.model.norm import RmsNorm
from experts.kernels.choose import Tally, choose_slots
from experts.kernels.linear import linear_fp32
from experts.second_stream import Aside
from simulations.hardware.gpu_grid import Grid
from simulations.hardware.gpu_meter import Meter
from simulations.hardware.gpu_timing import Call, Timing
from simulations.hardware.own_attention import Scene
from simulations.hardware.own_products import normal

EPS = 1e-6


def row_grids(model: ModelConfig, rows: Sequence[int], meter: Meter) -> list[Grid]:
    """ "elementwise/attention/<hidden>": norms, and rotation with the write to the cache as far as no
    product hides it; "gate/<experts>x<hidden>": norm, product and choice."""
    own = OwnRows(model, meter)
    hidden, experts = model.hidden_size, model.num_experts
    return [
        Grid(
            name=f"elementwise/attention/{hidden}",
            axes={"tokens": rows},
            time=own.attention,
        ),
        Grid(
            name=f"gate/{experts}x{hidden}",
            axes={"tokens": rows},
            time=own.gate,
        ),
    ]


class OwnRows:
    def __init__(self, model: ModelConfig, meter: Meter) -> None:
        self._model, self._meter = model, meter

    def gate(self, tokens: int) -> Timing:
        model, device = self._model, self._meter.device
        gate, hidden = model.gate, model.hidden_size
        x_TH, residual_TH, gain_H = self._stream(tokens)
        tally = Tally(
            chosen_E=torch.zeros(gate.num_experts, dtype=torch.int64, device=device),
            recent_MK=torch.full((32, gate.num_experts_per_token), -1, device=device),
        )
        bias_E = torch.randn(gate.num_experts, device=device) if model.has_correction_bias else None
        table_E = torch.arange(gate.num_experts, dtype=torch.int32, device=device)
        gains_E = torch.rand(gate.num_experts, device=device) + 0.5
        num_tokens = torch.full((1,), tokens, dtype=torch.int32, device=device)

        def call(w_EH: torch.Tensor) -> object:
            normed_TH, _ = fused.add_rms_norm(x_TH, residual_TH, gain_H, EPS)
            return choose_slots(
                linear_fp32(normed_TH, w_EH), gate, bias_E,
                num_tokens=num_tokens, table_E=table_E, gains_E=gains_E, tally=tally,
            )  # fmt: skip

        weights = self._meter.copies(
            lambda: normal(self._meter, gate.num_experts, hidden).float(),
            4.0 * gate.num_experts * hidden,
        )
        return self._meter.seconds([lambda w=w: call(w) for w in weights])  # type: ignore[misc]

    def attention(self, tokens: int) -> Timing:
        """Norms and rotation, less the product beside which the rotation runs."""
        norms = self._norms(tokens)
        whole, product = self._rotations(tokens)
        both = self._meter.seconds(norms)
        all_of_it, alone = (
            self._meter.seconds(whole),
            self._meter.seconds(product) if product else None,
        )
        rest = all_of_it.p50 - (alone.p50 if alone else 0.0)
        return Timing(p50=both.p50 + max(rest, 0.0), p99=both.p99 + max(rest, 0.0))

    def _norms(self, tokens: int) -> list[Call]:
        x_TH, residual_TH, gain_H = self._stream(tokens)
        attention = self._model.attention
        rank = attention.q_lora_rank if isinstance(attention, MlaConfig) else 0
        down_TX = normal(self._meter, tokens, rank + 576) if rank else None

        def call() -> None:
            fused.add_rms_norm(x_TH, residual_TH, gain_H, EPS)
            if down_TX is not None:
                fused.rms_norm(down_TX[:, :rank], gain_H[:rank], EPS)

        return [call]

    def _rotations(self, tokens: int) -> tuple[list[Call], list[Call]]:
        """Calls with the rotation, and of what else is in them."""
        ops, attention = KernelOps(), self._model.attention
        scene = Scene.decode(self._model, tokens, 1, 1, self._meter)
        (cache,), step = scene.caches, scene.step
        if not isinstance(attention, MlaConfig):
            width = (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim
            qkv_TX = normal(self._meter, tokens, width)
            norm = self._norm(attention.head_dim) if attention.qk_norm else None
            store = lambda: ops.store_heads(  # noqa: E731
                qkv_TX, norm, norm, attention.num_kv_heads, step, cache
            )
            return [store], []
        c = attention
        latent_norm = self._norm(c.kv_lora_rank)
        latent_TX = normal(self._meter, tokens, c.kv_lora_rank + c.qk_rope_head_dim)
        query_TNX = normal(
            self._meter, tokens, c.num_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        )
        w_uk_NCM = normal(self._meter, c.num_heads, c.kv_lora_rank, c.qk_nope_head_dim)
        q_TND = normal(self._meter, tokens, c.num_heads, c.kv_lora_rank + c.qk_rope_head_dim)

        def product() -> None:
            nope = query_TNX[..., : c.qk_nope_head_dim]
            ops.linears(nope, w_uk_NCM, out_TNO=q_TND[..., : c.kv_lora_rank])

        def both() -> None:
            aside = Aside(self._meter.device, on=tokens <= STORED_ASIDE)
            with aside:
                ops.store_latents(latent_TX, query_TNX, latent_norm, step, cache, q_TND)
            product()
            aside.join()

        return [both], [product]

    def _stream(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self._model.hidden_size
        x_TH, residual_TH = (normal(self._meter, tokens, hidden) for _ in range(2))
        return x_TH, residual_TH, normal(self._meter, hidden)

    def _norm(self, size: int) -> RmsNorm:
        return RmsNorm(normal(self._meter, size), EPS)
