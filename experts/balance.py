"""When ranks exchange counts in order to even out a step, and how: what all layers have in common."""

from typing import Literal

from comms.base import BaseDispatcher
from comms.counts import CountExchange

SplitMode = Literal["auto", "static", "balanced", "activated", "nodes"]

# Of a CPU: two small exchanges and the division; what a rank computes; and the part of that for which
# ranks otherwise wait for the one with the most.
_EXCHANGE_S = 0.7e-3
_FLOP_PER_S = 50e9
_SAVED = 0.2
_TOKENS_BETWEEN = 64  # of the rank with most, between two exchanges in small steps


class Balance:
    """What the balanced choices of all layers share: the exchange of counts, and when to use it.

    auto: in steps in which it takes less time than it saves, by the floating-point operations of a
    token's experts; balanced, activated and nodes: in all.
    """

    def __init__(self, exchange: CountExchange, mode: SplitMode, token_flop: float) -> None:
        self.exchange, self.mode = exchange, mode
        links = exchange.groups.links
        cost_s = _EXCHANGE_S + (links.latency_s if links else 0.0)
        self._least_tokens = cost_s / _SAVED * _FLOP_PER_S / max(1.0, token_flop)
        self._tokens_since = 0
        self.expect(None)

    def expect(self, max_tokens: int | None) -> None:
        """No rank has more tokens in the coming step (None: unknown), the same on every rank.

        `applies`: the step's own counts decide. `due`: not they, but it is time to exchange those of
        the steps since the last exchange.
        """
        is_large = max_tokens is not None and max_tokens >= self._least_tokens
        self.applies = is_large or self.mode != "auto"
        self._tokens_since += max_tokens or 0
        self.due = not self.applies and self._tokens_since >= _TOKENS_BETWEEN
        if self.applies or self.due:
            self._tokens_since = 0


def make_balance(mode: SplitMode, dispatcher: BaseDispatcher, token_flop: float) -> Balance | None:
    """None where all layers choose statically: in mode static, and in auto with combine "node".

    Raises ValueError for the other modes with "node", whose sums depend on the choice.
    """
    if mode == "static" or (mode == "auto" and dispatcher.combine_mode == "node"):
        return None
    if dispatcher.combine_mode == "node":
        raise ValueError(
            f'split "{mode}" needs combine "fixed" or "exact": with "node" the batch would decide '
            "where sums are rounded"
        )
    return Balance(CountExchange(dispatcher), mode, token_flop)
