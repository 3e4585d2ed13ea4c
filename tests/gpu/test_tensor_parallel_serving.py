"""The engine on two GPUs that are one replica: every request gets the same tokens in any company."""

from __future__ import annotations

import pytest

pytest.importorskip("zmq", reason="needs what the engine needs")

from tests.gpu.served import configured, on_two, requests, with_few_graphs

pytestmark = pytest.mark.usefixtures("both_gpus")


def test_every_request_gets_its_own_tokens_in_any_company(pair):
    together = on_two(pair, configured(tp=2), requests(9))
    assert len(set(together["r1"])) > 3, "a text, not one token again and again"
    larger = on_two(pair, configured(tp=2, most=24), requests(9), fn=with_few_graphs)
    assert larger == together
    alone = on_two(pair, configured(tp=2), [requests(9)[5]])  # which asks for its experts, too
    assert alone["r5"] == together["r5"]
