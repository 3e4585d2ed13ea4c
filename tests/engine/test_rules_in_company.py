"""What requests ask of their tokens holds in a crowd: preempted and resumed, they get the same ones."""

import json

import jsonschema
import pytest
from tokenizers import Tokenizer

from cluster import offline
from cluster.config import ServeConfig
from cluster.engine.constraint import Constraint
from cluster.engine.engine import build_engine
from cluster.engine.mailbox import Frame, LocalMailbox
from cluster.engine.sampling_params import SamplingParams
from comms.groups import ParallelGroups
from comms.launch import RankPool
from deploy.settings import BUNDLED_MODELS

MOSAIC = BUNDLED_MODELS["mosaic"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 9}},
    "required": ["name", "ages"],
}  # fmt: skip
WISHES = {
    "penalised": {"frequency_penalty": 0.7, "repetition_penalty": 1.2, "temperature": 0.0},
    "seeded": {"presence_penalty": 1.0, "bad_words": [[5], [6, 7]], "logit_bias": {9: -3.0}},
    "json": {"constraint": Constraint("json_schema", json.dumps(SCHEMA)), "logprobs": 2},
    "choice": {"constraint": Constraint("choices", '["first of all", "first of none"]')},
    "patient": {"min_tokens": 20, "stop_token_ids": list(range(0, 6144, 2))},
}


def frames() -> list[Frame]:
    prompt = Tokenizer.from_file(str(MOSAIC / "tokenizer.json")).encode("Once upon a time").ids
    return [
        offline.add_frame(name, prompt, SamplingParams(seed=4, max_tokens=40, **wish))
        for name, wish in WISHES.items()
    ]


def serve(groups: ParallelGroups, config: ServeConfig) -> tuple[dict[str, list], int]:
    """Events by request, and how often a sequence was preempted."""
    mailbox = LocalMailbox(frames())
    engine = build_engine(config, groups, mailbox)
    while engine.step():
        pass
    engine.runner.close()
    events = {name: [e for e in mailbox.events if e.request_id == name] for name in WISHES}
    return events, engine.scheduler.num_preemptions


def config_for(**sections) -> ServeConfig:
    return ServeConfig.from_dict({"model": str(MOSAIC), **sections})


@pytest.fixture(scope="module")
def alone(rank_pool: RankPool) -> dict[str, list]:
    config = config_for(scheduler={"max_num_seqs": 1})
    [(events, _)] = rank_pool.run(serve, config.parallel.topology, config, timeout_s=200)
    return events


def tokens(events: list) -> list[int]:
    assert events[-1].error is None
    return [event.token_id for event in events if event.token_id is not None]


def test_preemption_changes_nothing(rank_pool: RankPool, alone: dict[str, list]) -> None:
    crowded = config_for(
        scheduler={"max_num_seqs": 8, "max_num_batched_tokens": 9},
        cache={"block_size": 4, "num_blocks": 20, "enable_prefix_caching": False},
    )
    [(events, preemptions)] = rank_pool.run(
        serve, crowded.parallel.topology, crowded, timeout_s=200
    )
    assert preemptions > 0
    assert {name: tokens(e) for name, e in events.items()} == {
        name: tokens(e) for name, e in alone.items()
    }
    assert [event.logprob for event in events["json"]] == [e.logprob for e in alone["json"]]


def test_each_got_what_it_asked_for(alone: dict[str, list]) -> None:
    decode = Tokenizer.from_file(str(MOSAIC / "tokenizer.json")).decode
    if alone["json"][-1].finish_reason == "stop":
        jsonschema.validate(json.loads(decode(tokens(alone["json"]))), SCHEMA)
    assert decode(tokens(alone["choice"])) in ("first of all", "first of none")
    assert alone["choice"][-1].finish_reason == "stop"
    patient = tokens(alone["patient"])
    assert len(patient) > 20
    assert all(token % 2 for token in patient[:20])
    assert 5 not in tokens(alone["seeded"])
    assert all(event.logprob.token_id == event.token_id for event in alone["json"])
