"""Expert layers over several GPUs: tokens to the ranks of their experts, sums back.

All layers share one exchange. Every rank makes the same passes with the same number of rows, padding
among them, because kernels of one rank wait for those of the others.

Legend: T rows, H hidden, K experts per token, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.model.config import ModelConfig
from cluster.model.errors import UnsupportedModelError
from comms.gpu_dispatcher import connect_dispatcher
from comms.groups import ParallelGroups
from comms.store import PrefixStore
from comms.symmetric_layout import BUFFERS, SymmetricLayout
from comms.symmetric_types import Received
from experts.cuda_moe import Rows
from experts.kernels.choose import Choice
from experts.kernels.types import QuantizedRows, SortedPairs
from router.placement import Placement


class RankExchange(Protocol):
    """What the model asks of it. `routed` is that of `experts.cuda_moe.Exchange`.

    `forms`: buffers take turns, so two passes that begin with different ones are different graphs.
    Ranks whose graphs were captured at other times then still begin alike: passes go through the forms
    in turn.
    """

    @property
    def forms(self) -> int: ...

    def expect(self, num_rows: int, form: int = 0) -> None:
        """The coming pass, run or captured: rows of every rank, and which of the forms it has."""

    @property
    def bytes_sent(self) -> dict[str, int]:
        """By this rank since the start: "intra_node", and "inter_node" where there are several."""

    def forget_bytes(self) -> None:
        """Count from zero again."""

    def check(self) -> None:
        """Raise CommTimeout or CommError if a peer failed in a pass that is over."""

    def close(self) -> None:
        """There will be no other pass."""

    def routed(
        self,
        x_TH: Tensor,
        choice: Choice,
        compute: Callable[[Rows, Tensor], tuple[Tensor, SortedPairs]],
    ) -> Tensor: ...


class Dispatcher(Protocol):
    """`comms.symmetric` or `comms.nodes`; each has handles of its own."""

    turn: int

    @property
    def bytes_sent(self) -> dict[str, int]: ...
    def forget_bytes(self) -> None: ...
    def expect(self, max_tokens: int | None) -> int: ...
    def dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None
    ) -> tuple[Received, Any]: ...
    def combine(self, y_PH: Tensor, place_RK: Tensor | None, handle: Any) -> Tensor: ...
    def check(self) -> None: ...
    def close(self) -> None: ...


class ExpertExchange:
    """By the dispatcher that suits where the GPUs are."""

    def __init__(self, dispatcher: Dispatcher, num_layers: int = BUFFERS) -> None:
        """`num_layers`: dispatches of a pass."""
        self.dispatcher = dispatcher
        self.forms = BUFFERS if num_layers % BUFFERS else 1

    def expect(self, num_rows: int, form: int = 0) -> None:
        self.dispatcher.expect(num_rows)
        self.dispatcher.turn = form

    @property
    def bytes_sent(self) -> dict[str, int]:
        return self.dispatcher.bytes_sent

    def forget_bytes(self) -> None:
        self.dispatcher.forget_bytes()

    def check(self) -> None:
        """A replayed graph does not look by itself."""
        self.dispatcher.check()

    def close(self) -> None:
        self.dispatcher.close()

    def routed(
        self,
        x_TH: Tensor,
        choice: Choice,
        compute: Callable[[Rows, Tensor], tuple[Tensor, SortedPairs]],
    ) -> Tensor:
        """out_TH: the weighted sums of what the experts of all ranks make of the rows."""
        assert choice.slots_TK is not None
        received, handle = self.dispatcher.dispatch(
            x_TH, choice.slots_TK, choice.weights_TK, choice.range_T
        )
        rows: Rows = received.x_RH
        if received.scale_RB is not None:
            rows = QuantizedRows(q_RH=received.x_RH, scale_RB=received.scale_RB)
        y_PH, pairs = compute(rows, received.local_slots_RK)
        return self.dispatcher.combine(y_PH, pairs.place_RK, handle)


class ExchangeOptions(Protocol):
    """The part of the configuration that says how tokens travel."""

    @property
    def combine(self) -> str: ...
    @property
    def timeout_s(self) -> float: ...


def connect_exchange(
    config: ModelConfig,
    groups: ParallelGroups,
    placement: Placement,
    options: ExchangeOptions,
    *,
    float8: bool,
    capacity: int,
    device: torch.device,
) -> RankExchange:
    """With all ranks, for at most `capacity` rows of each. Collective.

    float8: the experts' weights are. Their rows travel as they are multiplied, whatever
    `comms.dispatch_dtype` is, so that a row has the same bits on the rank that it came from and on others.
    Raises UnsupportedModelError for what the kernels cannot do, and what `connect_dispatcher` does.
    """
    assert groups.store is not None, "ranks that meet have a store"
    layout = exchange_layout(
        config, groups.topology.world_size, placement, options, float8=float8, capacity=capacity
    )
    dispatcher = connect_dispatcher(
        groups.topology,
        layout,
        PrefixStore("experts", groups.store),
        groups.rank,
        device,
        where=groups.where,
        timeout_s=options.timeout_s,
    )
    return ExpertExchange(dispatcher, config.num_moe_layers)


def exchange_layout(
    config: ModelConfig,
    world_size: int,
    placement: Placement,
    options: ExchangeOptions,
    *,
    float8: bool,
    capacity: int,
) -> SymmetricLayout:
    """What ranks that exchange this model's rows agree on; raises as `connect_exchange`."""
    try:
        return SymmetricLayout(
            world_size=world_size,
            slots_per_rank=placement.slots_per_rank,
            hidden=config.hidden_size,
            num_topk=config.gate.num_experts_per_token,
            capacity=capacity,
            dispatch_dtype="float8" if float8 else "bfloat16",
            combine=options.combine,  # type: ignore[arg-type]  # it says what there is
        )
    except ValueError as error:
        raise UnsupportedModelError(f"experts on several GPUs: {error}") from None
