"""Models whose attention is divided over two GPUs, beside one GPU and beside themselves in other company."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from comms.groups import ParallelGroups
from comms.topology import Topology
from tests.gpu.divided_models import DividedCase
from tests.gpu.greedy import BLOCKS, Sequence, decode

pytestmark = pytest.mark.usefixtures("both_gpus")

PAIR = Topology(num_nodes=1, ranks_per_node=2, tensor_parallel_size=2)
WANTED = 8
CASES = {
    "mla": DividedCase(kind="mla", combine="fixed"),
    "gqa": DividedCase(kind="gqa", combine="node"),
    "mla-fp8": DividedCase(kind="mla", combine="fixed", quantization="fp8"),
}


def sequences(number: int) -> list[Sequence]:
    """The first is the same in every company."""
    mine = Sequence(ids=[(7 * i + 3) % 96 for i in range(33)], first=0, wanted=WANTED, chunk=5)
    others = [
        Sequence(
            ids=[(11 * i + j) % 96 for j in range(1 + 29 * i % 140)],
            first=i * BLOCKS, wanted=1 + i % WANTED, chunk=1 + i % 64,
        )
        for i in range(1, number)
    ]  # fmt: skip
    return [mine, *others]


@dataclass(frozen=True)
class Spoken:
    """A model whose leader tells the others its logits, so that all go on with the same tokens."""

    model: Any
    groups: ParallelGroups

    def forward(self, batch, kv):
        logits_LV = self.model.forward(batch, kv)
        shape = (len(batch.logit_rows), self.model.config.vocab_size)
        leads = self.groups.tp.idx == 0
        assert leads == (logits_LV is not None)
        mine = logits_LV.cpu() if leads else torch.empty(shape)
        return self.groups.tp.broadcast(mine, 0)


def decode_pair(groups: ParallelGroups, case: DividedCase):
    """The first sequence alone; raises AssertionError if any company changes a bit of it."""
    model = case.on_two(groups)
    kv = model.new_cache(6 * BLOCKS, 16)
    spoken = Spoken(model, groups)
    alone = decode(spoken, kv, sequences(1))[0]
    eager = Spoken(replace(model, graphs=None), groups)
    for number, company in ((6, spoken), (3, eager)):
        again = decode(company, kv, sequences(number))[0]
        assert again.tokens == alone.tokens, number
        for a, b in zip(again.logits, alone.logits, strict=True):
            assert torch.equal(a, b), number
    assert len(model.graphs) > 1
    sent = model.bytes_sent()
    assert sent["intra_node"] > 0 == sent["inter_node"]
    return alone.tokens, [row_V.numpy() for row_V in alone.logits]


@pytest.mark.parametrize("name", CASES)
def test_two_gpus_give_what_one_gives_in_any_company(pair, name):
    case = CASES[name]
    (tokens, logits), _ = pair.run(decode_pair, PAIR, case, timeout_s=120, comm_timeout_s=120)
    model = case.on_one()
    one = decode(model, model.new_cache(BLOCKS, 16), sequences(1))[0]
    same = next(
        (i for i, (a, b) in enumerate(zip(tokens, one.tokens, strict=True)) if a != b), WANTED
    )
    errors = [
        float((torch.from_numpy(a) - b).norm() / b.norm())
        for a, b in zip(logits[: same + 1], one.logits, strict=False)
    ]
    print(f"{case.kind} {case.combine}: {same} of {WANTED} tokens, relative L2", errors)
    # A gate may choose otherwise where two experts are nearly equal: one such token is far off.
    assert errors[0] < case.most_error
    assert sorted(errors)[len(errors) // 2] < case.most_error
    assert same > 0 or case.quantization == "fp8"  # whose errors may turn a near-tie at once


def stopped(groups: ParallelGroups) -> str:
    """What the rank says whose peer leaves it alone in a pass."""
    from comms.group import CommTimeout

    model = CASES["gqa"].on_two(groups)
    kv = model.new_cache(BLOCKS, 16)
    decode(Spoken(model, groups), kv, [Sequence(ids=[5, 9], first=0, wanted=1)])
    model.replica.rows.report.timeout_s = model.exchange.dispatcher.report.timeout_s = 0.5
    model = replace(model, graphs=None)  # which have the old deadline
    groups.world.barrier()
    message = ""
    if groups.rank == 0:
        with pytest.raises(CommTimeout) as raised:
            decode(model, kv, [Sequence(ids=[5, 9], first=0, wanted=1)])
        message = str(raised.value)
    groups.world.barrier()
    return message


def test_a_rank_that_is_left_alone_says_who_did_not_come(pair):
    message, _ = pair.run(stopped, PAIR, timeout_s=120, comm_timeout_s=120)
    assert "rank 0 waited 0.5 s in" in message
    assert "rank 1" in message
