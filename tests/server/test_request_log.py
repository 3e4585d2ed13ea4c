"""One line for each request that ends, with what its client was told and never its text."""

import json
import logging

import pytest

from cluster.logs import JsonFormatter
from cluster.server.errors import RequestError
from tests.server.collector import generate_in_trace
from tests.server.serving import serve

LOGGER = "cluster.server.observe.request_log"


def lines(caplog):
    formatter = JsonFormatter("controller")
    records = [record for record in caplog.records if record.name == LOGGER]
    return [json.loads(formatter.format(record)) for record in records]


def test_a_request_that_ends_is_one_line_of_its_figures(caplog):
    with caplog.at_level(logging.INFO, LOGGER), serve("observability.log_requests=true") as serving:
        answer = serving.client.generate("the cat sat", max_tokens=5, ignore_eos=True)
        serving.leaders[0].fail_prompts_with = 7
        with pytest.raises(RequestError):
            serving.client.generate([7], request_id="unlucky")
    told, failed = lines(caplog)
    usage = answer.usage
    assert told["request_id"] == answer.prompt.request_id
    assert told["outcome"] == "length"
    assert told["prompt_tokens"] == usage.prompt_tokens
    assert told["completion_tokens"] == usage.completion_tokens == 5
    assert told["cached_tokens"] == usage.cached_tokens
    assert told["first_token_ms"] == pytest.approx(usage.ttft_ms, abs=1e-3)
    assert told["first_token_ms"] <= told["last_token_ms"] <= usage.total_ms
    assert (failed["request_id"], failed["outcome"]) == ("unlucky", "INTERNAL")
    assert failed["first_token_ms"] is None
    for text in ("the cat sat", answer.text):
        assert text not in json.dumps([told, failed], ensure_ascii=False)


def test_a_line_names_the_trace_of_its_caller(caplog):
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    with caplog.at_level(logging.INFO, LOGGER), serve("observability.log_requests=true") as serving:
        generate_in_trace(serving, f"00-{trace_id}-b7ad6b7169203331-01", max_tokens=1)
    assert lines(caplog)[0]["trace_id"] == trace_id


def test_by_default_there_are_none(caplog):
    with caplog.at_level(logging.INFO, LOGGER), serve() as serving:
        serving.client.generate([5], max_tokens=2)
    assert lines(caplog) == []
