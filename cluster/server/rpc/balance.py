"""What the rebalancer knows, as messages of service Control."""

import numpy as np

from cluster.balance_record import BalanceRecord, balancedness
from cluster.rebalancer import Outcome, Rebalancer
from cluster.server.proto.expertmesh.v1 import control_pb2 as pb


def placement_message(rebalancer: Rebalancer) -> pb.GetExpertPlacementResponse:
    placement = rebalancer.placement
    return pb.GetExpertPlacementResponse(
        epoch=placement.epoch,
        num_experts=placement.num_experts,
        num_ranks=placement.num_ranks,
        ranks_per_node=placement.ranks_per_node,
        slots_per_rank=placement.slots_per_rank,
        layers=[
            pb.LayerSlots(layer=layer, experts=row)
            for layer, row in zip(
                rebalancer.facts.model_layers, placement.physical_to_logical.tolist(), strict=True
            )
        ],
    )


async def balance_message(rebalancer: Rebalancer) -> pb.GetBalanceResponse:
    """Without ranks and layers as long as no rank has been heard."""
    record, placement = rebalancer.loads.record, rebalancer.placement
    message = pb.GetBalanceResponse(
        epoch=placement.epoch,
        rebalances=_rebalances(rebalancer),
        enabled_reason=rebalancer.state,
    )
    if record.last is None:
        return message
    window_s, served_RL = record.served()
    served_L = balancedness(served_RL)
    planned_L = await rebalancer.planned_balancedness()
    message.window_s = window_s
    message.ranks.extend(_ranks(record, placement.ranks_per_node or placement.num_ranks))
    message.layers.extend(
        pb.LayerBalance(layer=layer, balancedness=served, planned=planned)
        for layer, served, planned in zip(
            rebalancer.facts.model_layers, served_L, planned_L, strict=True
        )
    )
    busy = served_L[served_L > 0]
    if len(busy):
        message.balancedness_mean = busy.mean()
        message.balancedness_min = busy.min()
        message.balancedness_p50 = np.median(busy)
    return message


def outcome_message(outcome: Outcome, rebalancer: Rebalancer) -> pb.RebalanceResponse:
    facts, effects = rebalancer.facts, outcome.draft.effects
    return pb.RebalanceResponse(
        started=outcome.started,
        epoch=outcome.epoch,
        layers=[
            pb.LayerEffect(
                layer=facts.model_layers[effect.layer],
                imbalance_before=effect.imbalance_before,
                imbalance_after=effect.imbalance_after,
                lower_bound=effect.lower_bound,
                moves=effect.moves,
                bytes=effect.moves * facts.expert_bytes,
                reason=effect.reason,
            )
            for effect in effects
        ],
        bytes=outcome.draft.num_moves * facts.expert_bytes,
        reason=_summary(outcome),
    )


def _summary(outcome: Outcome) -> str:
    rows, effects = outcome.draft.rows, outcome.draft.effects
    if not rows:
        return "nothing to move: no layer would be better balanced"
    worst_before = max(effect.imbalance_before for effect in effects)
    worst_after = max(effect.imbalance_after for effect in effects)
    changing = "changing" if outcome.started else "to change"
    return (
        f"{len(rows)} of {len(effects)} layers {changing}; worst imbalance {worst_before:.3f} -> "
        f"{worst_after:.3f}"
    )


def _ranks(record: BalanceRecord, ranks_per_node: int) -> list[pb.RankBalance]:
    last = record.last
    assert last is not None, "only asked for once there is one"
    served_RL = record.served()[1]
    intra_R, inter_R = record.sent_per_s()
    return [
        pb.RankBalance(
            rank=rank,
            node=rank // ranks_per_node,
            served=served_RL[rank].tolist(),
            served_total=int(served_RL[rank].sum()),
            intra_node_bytes=int(last.intra_node_bytes_R[rank]),
            inter_node_bytes=int(last.inter_node_bytes_R[rank]),
            intra_node_bytes_per_s=intra_R[rank],
            inter_node_bytes_per_s=inter_R[rank],
            step_ms=last.step_ms_R[rank],
        )
        for rank in range(len(served_RL))
    ]


def _rebalances(rebalancer: Rebalancer) -> pb.RebalanceStats:
    counters, last = rebalancer.counters, rebalancer.loads.record.last
    return pb.RebalanceStats(
        started=counters.started,
        finished=counters.finished,
        abandoned=counters.abandoned,
        moves=counters.moves,
        bytes=last.moved_bytes if last else 0,
        seconds=counters.seconds,
        stall_ms=last.stall_ms if last else 0.0,
        running=rebalancer.running,
        doing=counters.doing,
        last_reason=counters.last_reason,
        last_error=counters.last_error,
    )
