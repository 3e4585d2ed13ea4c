"""Where a decode step's time goes: the served engine, without Ray and gRPC around it.

All ranks run on this machine. The leader of replica 0 reports its own phases; while it waits in a
collective for slower ranks, that wait counts to the collective's phase.
"""

from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from cluster.config import ServeConfig
from cluster.engine.engine import build_engine
from cluster.engine.mailbox import LocalMailbox
from cluster.engine.sampling_params import SamplingParams
from cluster.offline import add_frame
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.ledger import TrafficLedger
from comms.trace import NO_TRACE, Trace, overlap
from comms.trace_file import write_trace

MODEL = ("attention", "dense", "gate", "dispatch", "experts", "combine", "logits")
OVERHEAD = ("mail", "schedule", "broadcast", "batch", "sample")
"""What a step takes besides its model: `broadcast` is agreeing with other leaders too, and waiting."""
PHASES = (*OVERHEAD[:-1], *MODEL, *OVERHEAD[-1:])
PROMPT_TOKENS = 32
WARM_UP_STEPS = 5
TIMEOUT_S = 600.0


def run(
    config: ServeConfig, sequences: int, steps: int, trace_file: Path | None = None
) -> dict[str, Any]:
    """Decode `sequences` sequences on every DP replica for `steps` steps.

    Returns {"step_ms", "tokens_per_s" of all replicas, "results": {phase: {"ms", "share"}}, ...};
    the phase "other" is what no other covers (norms, embedding, bookkeeping). "overhead_share": of the
    phases in OVERHEAD, in a step. "traffic": the ledger of all ranks, by stage, by layer, and by step
    for the last few. With a
    `trace_file` every rank's spans of these steps go there, and "overlap" says by rank how long the
    network was busy and how much of that was hidden. Raises TraceError if it cannot be written.
    """
    topology = config.parallel.topology
    config = _roomy(config, sequences, steps)
    with RankPool(topology.world_size) as pool:
        answers = pool.run(
            _decode,
            topology,
            config,
            sequences,
            steps,
            trace_file is not None,
            timeout_s=TIMEOUT_S,
            node_backend=config.comms.node_backend,
            inter_node_backend=config.comms.inter_node_backend,
        )
    report: dict[str, Any] = answers[0][0]
    ledger = TrafficLedger(topology=topology)
    for _, _, of_rank in answers:
        ledger.merge(of_rank)
    report["traffic"] = ledger.to_json()
    if trace_file is not None:
        traces = [trace for _, trace, _ in answers]
        write_trace(trace_file, traces)
        report["overlap"] = [
            {"rank": rank, **asdict(found), "hidden_fraction": found.hidden_fraction}
            for rank, found in overlap(traces).items()
        ]
    return {
        "layout": f"{topology.num_nodes}x{topology.ranks_per_node}",
        "sequences_per_replica": sequences,
        "steps": steps,
        "tokens_per_s": 1000 * sequences * topology.num_replicas / report["step_ms"],
        **report,
    }


def _roomy(config: ServeConfig, sequences: int, steps: int) -> ServeConfig:
    """Room for all sequences at once and all prompts in the first step: no preemption, no queue.

    Planning is not overlapped: phases that run side by side would not add up to the step.
    """
    tokens = PROMPT_TOKENS + WARM_UP_STEPS + steps + 1
    blocks = sequences * (tokens // config.cache.block_size + 1)
    scheduler = {
        "max_num_seqs": sequences,
        "max_num_batched_tokens": sequences * PROMPT_TOKENS,
        "async_scheduling": False,
    }
    return config.model_copy(
        update={
            "cache": config.cache.model_copy(update={"num_blocks": blocks}),
            "scheduler": config.scheduler.model_copy(update=scheduler),
        }
    )


def _decode(
    groups: ParallelGroups, config: ServeConfig, sequences: int, steps: int, traced: bool
) -> tuple[dict[str, Any], Trace, TrafficLedger]:
    """What each rank does: prefill and warm up, then decode under the clock."""
    params = SamplingParams(temperature=0.0, max_tokens=steps + WARM_UP_STEPS + 1, ignore_eos=True)
    prompts = [[3 + (idx + i) % 200 for i in range(PROMPT_TOKENS)] for idx in range(sequences)]
    requests = [add_frame(f"bench-{idx}", prompt, params) for idx, prompt in enumerate(prompts)]
    is_leader = groups.topology.tp_rank_of(groups.rank) == 0
    engine = build_engine(config, groups, LocalMailbox(requests) if is_leader else None)
    for _ in range(WARM_UP_STEPS):
        engine.step()
    node = groups.topology.node_of(groups.rank)
    trace = Trace(groups.rank, node=node, where=groups.where) if traced else NO_TRACE
    timer = engine.runner.timer
    timer.reset()
    ledger = engine.runner.model.dispatcher.ledger
    ledger.clear()
    timer.trace = engine.runner.model.dispatcher.trace = trace
    start = perf_counter()
    for number in range(steps):
        with trace.span("step", f"step {number}"):
            engine.step()
    step_s = (perf_counter() - start) / steps
    engine.runner.close()
    seconds = {phase: timer.seconds.get(phase, 0.0) / steps for phase in PHASES}
    seconds["other"] = step_s - sum(seconds.values())
    report = {
        "step_ms": 1000 * step_s,
        "overhead_share": sum(seconds[phase] for phase in OVERHEAD) / step_s,
        "results": {
            phase: {"ms": 1000 * value, "share": value / step_s} for phase, value in seconds.items()
        },
    }
    return report, trace, ledger
