"""What the model on a GPU computes with: one place that says which kernel does what.

The layers call these functions and nothing else on the step path, so that a test can put plain torch
in their place and run the whole model where there is no GPU.

Legend: T rows, H hidden, I in-features, O out-features, N heads, D channels of a key, C of a latent,
V of a value, F rotary frequencies, L positions, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from cluster.model.cuda.inputs import StepInputs
from cluster.model.cuda.slots import DeviceSlots
from cluster.model.cuda.weights import Matrix, Norm
from cluster.model.kv_cache import LayerCache
from cluster.model.norm import RmsNorm
from experts.kernels.types import NormedRows
from experts.slot_choice import SlotChoice
from router.gate import Gate
from router.placement import LayerPlacement


@dataclass(frozen=True, kw_only=True)
class Step:
    """What all layers of a pass share. `plan` is what the attention kernel made of the inputs; `own_tokens`,
    int32 [1]: how many of this rank's own rows are tokens (None: all), see `replica`."""

    inputs: StepInputs
    cos_LF: Tensor
    sin_LF: Tensor
    interleaved: bool
    plan: Any
    own_tokens: Tensor | None = None


class Unsummed(Protocol):
    """Rows whose sum over experts is still to be made: whoever norms them can do so meanwhile."""

    def sum(self) -> Tensor: ...


Added = Tensor | Unsummed
"""What a block of a layer leaves to be added to the residual stream, bfloat16."""


@runtime_checkable
class LeavesSum(Protocol):
    """An MLP that can leave its sum to the next norm."""

    def unsummed(self, rows: NormedRows, num_tokens: Tensor | None = None) -> Added: ...


class Ops(Protocol):
    """A row's bits depend on that row alone, in all of them."""

    def linear(self, x_TI: Tensor | NormedRows, w: Matrix) -> Tensor:
        """[T, O] bfloat16."""

    def linears(self, x_TNI: Tensor, w_NOI: Tensor, out_TNO: Tensor | None = None) -> Tensor:
        """Each head's own product."""

    def rms_norm(self, x_TH: Tensor, norm: Norm) -> NormedRows: ...

    def add_rms_norm(
        self, x_TH: Added, residual_TH: Tensor, norm: Norm
    ) -> tuple[NormedRows, Tensor]:
        """(norm of x + residual, their sum)."""

    def silu_and_multiply(self, gate_up: Tensor) -> Tensor: ...

    def plan(self, inputs: StepInputs, block_size: int) -> Any:
        """What `attention` needs to know of a pass, made once for all layers."""

    def store_latents(
        self,
        latent_TX: Tensor,
        query_TNX: Tensor,
        norm: RmsNorm,
        step: Step,
        cache: LayerCache,
        q_TND: Tensor,
    ) -> None:
        """MLA: latent_TX is [latent, rotary key] of each token, query_TNX [un-rotated, rotary query] of
        each head. The latent's norm and the turned key go to the token's place in the cache, finite;
        the turned queries to q_TND[..., C:]."""

    def store_heads(
        self,
        qkv_TX: Tensor,
        q_norm: RmsNorm | None,
        k_norm: RmsNorm | None,
        num_kv_heads: int,
        step: Step,
        cache: LayerCache,
    ) -> Tensor:
        """GQA: qkv_TX is [query heads, key heads, value heads] of each token; keys (normed, turned) and
        values go to the cache. The normed and turned queries, [T, N, D]."""

    def attention(
        self, q_TND: Tensor, cache: LayerCache, plan: Any, scale: float, value_dim: int
    ) -> Tensor:
        """[T, N, V] bfloat16: of keys at or before each token's position, in its own blocks."""

    def experts(
        self,
        gate: Gate,
        slots: DeviceSlots,
        placement: LayerPlacement,
        rank: int,
        shared: tuple[Matrix, Matrix] | None,
        gains_E: Tensor | None,
        exchange: Any = None,
    ) -> ExpertLayer:
        """A whole expert layer. `gains_E`: add up in integers, see `comms.fixed`; None: in fp32.
        `exchange`: with the other ranks, see `experts.cuda_moe`; None: all experts are here."""


class ExpertLayer(Protocol):
    """What the model, the runner and the migrator see of an expert layer; counters are on the host."""

    layer_placement: LayerPlacement
    choice: SlotChoice
    record: list[Tensor] | None

    @property
    def slots(self) -> Any: ...
    @property
    def routed_E(self) -> Tensor: ...
    @property
    def tokens_per_slot_S(self) -> Tensor: ...
    @property
    def recent_TK(self) -> Tensor: ...
    @property
    def num_bytes(self) -> int:
        """Of its weights besides the experts in slots."""

    @property
    def reads_float8(self) -> bool:
        """Whether it has use for rows in FP8."""

    def forward(self, rows: NormedRows, num_tokens: Tensor | None = None) -> Tensor: ...
    def forget_counters(self) -> None: ...
