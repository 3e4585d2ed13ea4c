"""Run a model on a fixed list of requests without Ray, gRPC or sockets to a gateway.

Each function is what *every rank* calls with its own groups, for instance through
`comms.launch.RankPool`; the rank that holds the answer returns it. The engine, the scheduler and
the model are the served ones; only the mailbox, and who decides on placements, differ.
"""

from collections.abc import Sequence
from contextlib import closing

from torch import Tensor

from cluster.config import ServeConfig
from cluster.engine.batch import forward_batch
from cluster.engine.engine import build_engine
from cluster.engine.mailbox import Frame, LocalMailbox
from cluster.engine.plan import Logits, PlanItem, StepPlan, block_table
from cluster.engine.runner import Runner
from cluster.engine.sampling_params import SamplingParams
from cluster.gpus import take_gpu
from cluster.model.batch import ForwardBatch
from cluster.scripted import Change, Script
from comms.groups import ParallelGroups


class OfflineError(RuntimeError):
    """A request that the engine refused or failed."""


def add_frame(request_id: str, token_ids: Sequence[int], params: SamplingParams) -> Frame:
    """The frame with which a gateway hands a request to a leader."""
    return {
        "type": "add",
        "request_id": request_id,
        "token_ids": list(token_ids),
        "sampling": params.to_dict(),
    }


def generate(
    groups: ParallelGroups,
    config: ServeConfig,
    requests: Sequence[Frame],
    changes: Sequence[Change] = (),
    store_address: str = "",
) -> dict[str, list[int]]:
    """Serve the requests, dealt out in turn to the DP replicas, until all have ended.

    `changes` of the placement are made meanwhile, one after the other; ranks agree on them through
    the store at that address. Returns token ids by request id, of this leader's own requests;
    nothing on followers. Raises OfflineError when a request ends with an error, or before all
    changes are in force.
    """
    if config.device == "cuda":
        take_gpu(groups.rank)
    topology = groups.topology
    mine = requests[topology.replica_of(groups.rank) :: topology.num_replicas]
    is_leader = topology.tp_rank_of(groups.rank) == 0
    mailbox = LocalMailbox(mine) if is_leader else None
    engine = build_engine(config, groups, mailbox)
    with closing(engine.runner) as runner:
        with Script(changes, runner, mailbox, groups, store_address) as script:
            while engine.step():
                pass
        if runner.epoch != len(changes):
            raise OfflineError(
                f"{runner.epoch} of {len(changes)} changes are in force: {script.failure}"
            )
    if mailbox is None:
        return {}
    tokens: dict[str, list[int]] = {frame["request_id"]: [] for frame in mine}
    for event in mailbox.events:
        if event.error is not None:
            raise OfflineError(f"request {event.request_id}: {event.error}")
        if event.token_id is not None:
            tokens[event.request_id].append(event.token_id)
    return tokens


def prefill_logits(
    groups: ParallelGroups, config: ServeConfig, prompts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Logits after every position of each prompt, fp32 [len(prompt), V] on leaders, else nothing.

    Each prompt is one prefill step of its own, the same on every replica.
    """
    if config.device == "cuda":
        take_gpu(groups.rank)
    with closing(Runner.load(config, groups)) as runner:
        batches = [_whole_prompt(prompt, runner.cache.block_size) for prompt in prompts]
        logits = [runner.model.forward(batch, runner.cache) for batch in batches]
    return [rows for rows in logits if rows is not None]


def _whole_prompt(prompt: Sequence[int], block_size: int) -> ForwardBatch:
    """One sequence in the cache's first blocks, with the logits of every position wanted."""
    blocks = block_table(range(-(-len(prompt) // block_size)))
    item = PlanItem(0, tuple(prompt), 0, blocks, Logits.ALL)
    return forward_batch(StepPlan.of([item]), block_size)
