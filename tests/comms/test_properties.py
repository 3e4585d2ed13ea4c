"""What every dispatcher owes in every combine mode, whoever holds which token and expert.

Nothing here knows how a dispatcher works: outputs are compared with themselves after tokens, ranks or
experts have moved, after memory was spoiled, or beside other work in flight; with sums in fp64; and
with what the kernel counted on the links.
"""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from comms.codec import WireFormat
from comms.codecs import CODECS
from comms.dispatcher import Received, TokenDispatcher
from comms.groups import ParallelGroups
from comms.shm import ShmGroup
from comms.topology import Topology
from simulations import netns
from simulations.bench.hosted import HostedRanks
from simulations.testbed import INTERFACE, Testbed
from tests.comms.batches import (
    Batch,
    Placement,
    combine_bound,
    dispatch_bound,
    exact_sum,
    make_batch,
    make_placement,
)
from tests.comms.cases import CAPACITY, WAYS, equal, make
from tests.comms.thread_world import run_threads

T = TypeVar("T")
TOPOLOGIES = [
    Topology(num_nodes=nodes, ranks_per_node=ranks)
    for nodes, ranks in itertools.product((1, 2, 3, 5), (1, 2, 3, 4))
]
SKEWS = (0.0, 0.5, 1.0, 2.0, math.inf)  # exponents of Zipf's law: from uniform to all to one
MODES = ("node", "exact", "fixed")


@dataclass(frozen=True, kw_only=True)
class Options:
    """A dispatcher by what the caller chooses."""

    way: str
    combine: str
    combine_dtype: str = "bfloat16"
    dispatch_dtype: str = "bfloat16"

    def dispatcher(self, groups: ParallelGroups, placement: Placement, hidden: int):
        return make(
            groups,
            self.way,
            slots_per_rank=placement.slots_per_rank,
            hidden=hidden,
            combine=self.combine,
            combine_dtype=self.combine_dtype,
            dispatch_dtype=self.dispatch_dtype,
        )


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything hypothesis draws, in numbers; tensors follow from `rng`."""

    topology: Topology
    options: Options
    dtype: torch.dtype
    tokens: int
    experts: int
    num_topk: int
    hidden: int
    skew: float
    home_skew: float | None  # None: as many on each rank
    missing: float
    seed: int

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def batch(self, rng: np.random.Generator, identity: bool = False) -> Batch:
        return make_batch(
            rng,
            tokens=self.tokens,
            experts=self.experts,
            num_topk=self.num_topk,
            hidden=self.hidden,
            dtype=self.dtype,
            skew=self.skew,
            missing=self.missing,
            identity=identity,
        )

    def placement(self, rng: np.random.Generator, topology: Topology | None = None) -> Placement:
        return make_placement(
            rng,
            topology or self.topology,
            tokens=self.tokens,
            experts=self.experts,
            skew=self.home_skew,
            spare_slots=self.seed % 2,
        )


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    codecs = st.sampled_from(["bfloat16", "bfloat16", *CODECS])
    return Scene(
        topology=draw(st.sampled_from(TOPOLOGIES)),
        options=Options(
            way=draw(st.sampled_from(WAYS)),
            combine=draw(st.sampled_from(MODES)),
            combine_dtype=draw(codecs),
            dispatch_dtype=draw(codecs),
        ),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])),
        tokens=draw(st.sampled_from([0, 1, 7, 20, CAPACITY])),
        experts=draw(st.sampled_from([1, 3, 8, 15, 24])),
        num_topk=draw(st.sampled_from(range(1, 9))),
        hidden=draw(st.sampled_from([1, 5, 24, 128, 130, 200])),
        skew=draw(st.sampled_from(SKEWS)),
        home_skew=draw(st.sampled_from(SKEWS)),
        missing=draw(st.sampled_from([0.0, 0.1, 0.6])),
        seed=draw(st.integers(0, 1000)),
    )


def rich(**more: object) -> Callable[[T], T]:
    """Decorator: scenes that chance may miss. Every way and mode with sums of many addends in fp32,
    which shows every bit, and low_latency full to its capacity on all ranks."""
    topology = Topology(num_nodes=3, ranks_per_node=3)

    def add(test: T) -> T:
        for way, combine in itertools.product(WAYS, MODES):
            full = way == "low_latency"
            scene = Scene(
                topology=topology,
                options=Options(way=way, combine=combine),
                dtype=torch.float32,
                tokens=CAPACITY * topology.world_size if full else CAPACITY,
                experts=24,
                num_topk=8,
                hidden=24,
                skew=0.0,
                home_skew=None if full else 0.5,
                missing=0.1,
                seed=7,
            )
            test = example(scene=scene, **more)(test)
        return test

    return add


def bring_home(groups: ParallelGroups, task: tuple[Batch, Placement, Options]) -> Tensor:
    """One exchange of one rank: out_TH."""
    batch, placement, options = task
    dispatcher = options.dispatcher(groups, placement, batch.x_NH.shape[1])
    return exchange(groups, dispatcher, batch, placement)[1]


def exchange(
    groups: ParallelGroups, dispatcher: TokenDispatcher, batch: Batch, placement: Placement
) -> tuple[list[Received], Tensor]:
    mine = placement.input_of(groups.rank, batch)
    pending = dispatcher.start_dispatch(mine.x_TH, mine.slots_TK, mine.weights_TK, mine.range_T)
    parts = list(pending)
    outputs = [placement.expert_outputs(part, groups.rank, batch) for part in parts]
    return parts, dispatcher.start_combine(outputs, pending.handle).wait()


def out_by_token(batch: Batch, placement: Placement, options: Options) -> Tensor:
    task = (batch, placement, options)
    world_size = placement.topology.world_size
    return placement.by_token(run_threads(bring_home, placement.topology, [task] * world_size))


def worst_excess(out_NH: Tensor, expected_NH: Tensor, bound_NH: Tensor) -> float:
    """The greatest error in units of its bound; more than one is too much, NaN never passes."""
    ratio_NH = (out_NH.double() - expected_NH.double()).abs() / bound_NH.clamp(min=1e-30)
    return float(ratio_NH.nan_to_num(nan=math.inf).max()) if ratio_NH.numel() else 0.0


# --- sums -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(scene=scenes())
@rich()
def test_identity_experts_return_x_times_the_sum_of_weights(scene: Scene) -> None:
    """fp32 over plain codecs leaves at most 18 roundings of 2^-24; the rest is each codec's own."""
    rng, options = scene.rng, scene.options
    batch, placement = scene.batch(rng, identity=True), scene.placement(rng)
    expected_NH = batch.x_NH.double() * batch.gain_NK.sum(dim=1, keepdim=True)
    bound_NH = dispatch_bound(batch, options.dispatch_dtype) + combine_bound(
        batch, scene.topology, options.combine, options.combine_dtype, expected_NH
    )
    # An output of zeros must fail: no bound reaches half of what is expected.
    assert (bound_NH.amin(dim=1) <= 0.5 * expected_NH.abs().amax(dim=1) + 1e-6).all()
    out_NH = out_by_token(batch, placement, options)
    assert out_NH.dtype == scene.dtype
    assert worst_excess(out_NH, expected_NH, bound_NH) <= 1
    assert not out_NH[~batch.used_NK.any(dim=1)].any()


# --- moving tokens, ranks and experts --------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(scene=scenes())
@rich()
def test_moving_tokens_moves_the_output(scene: Scene) -> None:
    """To any place on any rank, bit for bit in every mode: only experts' places may count."""
    rng = scene.rng
    batch, placement = scene.batch(rng), scene.placement(rng)
    elsewhere = replace(placement, tokens=scene.placement(rng).tokens)
    assert equal(
        out_by_token(batch, placement, scene.options),
        out_by_token(batch, elsewhere, scene.options),
    )


@settings(max_examples=40, deadline=None)
@given(scene=scenes(), of=st.sampled_from(["nodes", "local ranks", "both"]))
@rich(of="both")
def test_renaming_ranks_renames_the_output(scene: Scene, of: str) -> None:
    """Bit for bit, but where "node" now adds three or more addends in another order."""
    rng, topology, options = scene.rng, scene.topology, scene.options
    batch, placement = scene.batch(rng), scene.placement(rng)
    nodes = np.arange(topology.num_nodes) if of == "local ranks" else None
    locals_ = np.arange(topology.ranks_per_node) if of == "nodes" else None
    nodes = rng.permutation(topology.num_nodes) if nodes is None else nodes
    locals_ = rng.permutation(topology.ranks_per_node) if locals_ is None else locals_
    names = [int(n) * topology.ranks_per_node + int(r) for n in nodes for r in locals_]
    renamed = placement.with_ranks_renamed(names)
    before_NH = out_by_token(batch, placement, options)
    after_NH = out_by_token(batch, renamed, options)
    if options.combine == "node":
        same_N = same_tree(placement.ranks_of(batch.experts_NK), names, topology)
        exact_NH = exact_sum(batch, options.dispatch_dtype)
        bound_NH = combine_bound(batch, topology, "node", options.combine_dtype, exact_NH)
        assert worst_excess(after_NH, before_NH, 2 * bound_NH) <= 1
        before_NH, after_NH = before_NH[same_N], after_NH[same_N]
    assert equal(before_NH, after_NH)


def same_tree(ranks_NK: Tensor, names: list[int], topology: Topology) -> Tensor:
    """Whether a token's sum is the same but for the order of two addends, which commute: bool [N]."""
    same = []
    for ranks_K in ranks_NK.tolist():
        ranks = sorted({rank for rank in ranks_K if rank >= 0})
        by_node = [
            [names[r] for r in of_node] for _, of_node in itertools.groupby(ranks, topology.node_of)
        ]
        levels = [*by_node, [topology.node_of(of_node[0]) for of_node in by_node]]
        same.append(all(len(level) <= 2 or level == sorted(level) for level in levels))
    return torch.tensor(same, dtype=torch.bool)


@settings(max_examples=40, deadline=None)
@given(scene=scenes(), topology=st.sampled_from(TOPOLOGIES))
@rich(topology=Topology(num_nodes=2, ranks_per_node=5))
def test_regrouping_experts_onto_other_ranks_and_nodes(scene: Scene, topology: Topology) -> None:
    """ "exact" and "fixed" give the same bits on any cluster, "node" the same sum within its bound."""
    rng, options = scene.rng, scene.options
    batch, placement = scene.batch(rng), scene.placement(rng)
    regrouped = scene.placement(rng, topology)
    outs = [out_by_token(batch, where, options) for where in (placement, regrouped)]
    exact_NH = exact_sum(batch, options.dispatch_dtype)
    for out_NH, where in zip(outs, (placement, regrouped), strict=True):
        bound_NH = combine_bound(
            batch, where.topology, options.combine, options.combine_dtype, exact_NH
        )
        assert worst_excess(out_NH, exact_NH, bound_NH) <= 1
    if options.combine != "node":
        assert equal(*outs)


# --- nothing lost, nothing twice -------------------------------------------------------------------


def take_part(
    groups: ParallelGroups, task: tuple[Batch, Placement, Options]
) -> tuple[list[tuple[float, int, int]], Tensor]:
    """(token's first channel, global slot, k) of every pair that came, and out_TH."""
    batch, placement, options = task
    dispatcher = options.dispatcher(groups, placement, batch.x_NH.shape[1])
    parts, out_TH = exchange(groups, dispatcher, batch, placement)
    first_slot = groups.rank * placement.slots_per_rank
    pairs = [
        (float(x_H[0]), first_slot + slot, k)
        for part in parts
        for x_H, slots_K in zip(part.x_RH, part.local_slots_RK.tolist(), strict=True)
        for k, slot in enumerate(slots_K)
        if slot >= 0
    ]
    return pairs, out_TH


@settings(max_examples=40, deadline=None)
@given(scene=scenes())
@rich()
def test_pairs_sent_are_received_and_brought_home(scene: Scene) -> None:
    """Token n is n + 1 throughout and weight k is 2^k: sums are exact, and spell out who took part."""
    rng, topology = scene.rng, scene.topology
    drawn, placement = scene.batch(rng, identity=True), scene.placement(rng)
    number_N = 1.0 + torch.arange(scene.tokens)
    batch = replace(
        drawn,
        x_NH=number_N[:, None].repeat(1, scene.hidden),
        weights_NK=torch.exp2(torch.arange(scene.num_topk)).repeat(scene.tokens, 1),
        range_N=torch.full((scene.tokens,), 2.0**13),
    )
    options = Options(way=scene.options.way, combine=scene.options.combine)
    task = (batch, placement, options)
    taken = run_threads(take_part, topology, [task] * topology.world_size)
    sent = Counter(
        (n + 1.0, slot, k)
        for n, slots_K in enumerate(placement.slots_of(batch.experts_NK).tolist())
        for k, slot in enumerate(slots_K)
        if slot >= 0
    )
    received = Counter(pair for pairs, _ in taken for pair in pairs)
    assert received == sent
    for rank, (pairs, _) in enumerate(taken):
        assert {slot // placement.slots_per_rank for _, slot, _ in pairs} <= {rank}
    out_NH = placement.by_token([out_TH for _, out_TH in taken])
    took_part_N = (batch.used_NK * batch.weights_NK).sum(dim=1)
    assert torch.equal(out_NH, (number_N * took_part_N)[:, None].expand_as(out_NH))


# --- handles ---------------------------------------------------------------------------------------


def reuse(
    groups: ParallelGroups, task: tuple[Batch, Tensor, Placement, Options]
) -> tuple[bool, list[Tensor]]:
    """Whether rows came as in a fresh dispatch; outputs of: first, second by the first's handle,
    second afresh, first by the old handle."""
    batch, x2_NH, placement, options = task
    dispatcher = options.dispatcher(groups, placement, batch.x_NH.shape[1])
    mine = placement.input_of(groups.rank, batch)
    pending = dispatcher.start_dispatch(mine.x_TH, mine.slots_TK, mine.weights_TK, mine.range_T)
    parts = list(pending)
    outputs = [placement.expert_outputs(part, groups.rank, batch) for part in parts]
    first_TH = dispatcher.start_combine(outputs, pending.handle).wait()

    second = replace(batch, x_NH=x2_NH)
    again_RH = dispatcher.dispatch_again(x2_NH[placement.tokens[groups.rank]], pending.handle)
    again = [
        replace(part, x_RH=x_RH)
        for part, x_RH in zip(
            parts, again_RH.split([len(part.x_RH) for part in parts]), strict=True
        )
    ]
    outputs2 = [placement.expert_outputs(part, groups.rank, second) for part in again]
    second_TH = dispatcher.start_combine(outputs2, pending.handle).wait()

    fresh, fresh_TH = exchange(groups, dispatcher, second, placement)
    same_rows = all(
        torch.equal(a.local_slots_RK, b.local_slots_RK)
        and torch.equal(a.x_RH[used_of(a)], b.x_RH[used_of(b)])
        for a, b in zip(again, fresh, strict=True)
    )
    once_more_TH = dispatcher.combine(torch.cat(outputs), pending.handle)
    return same_rows, [first_TH, second_TH, fresh_TH, once_more_TH]


def used_of(received: Received) -> Tensor:
    return (received.local_slots_RK >= 0).any(dim=1)


@settings(max_examples=40, deadline=None)
@given(scene=scenes())
@rich()
def test_a_handle_carries_a_second_payload_like_a_fresh_dispatch(scene: Scene) -> None:
    rng, topology = scene.rng, scene.topology
    batch, placement = scene.batch(rng), scene.placement(rng)
    x2_NH = torch.from_numpy(rng.standard_normal(batch.x_NH.shape)).to(scene.dtype)
    task = (batch, x2_NH, placement, scene.options)
    for same_rows, outs in run_threads(reuse, topology, [task] * topology.world_size):
        first_TH, second_TH, fresh_TH, once_more_TH = outs
        assert same_rows
        assert equal(second_TH, fresh_TH)
        assert equal(once_more_TH, first_TH)


# --- the same bits again, over processes -----------------------------------------------------------

TRANSPORTS = {
    "shm and tcp": {"node_backend": "shm", "inter_node_backend": "tcp"},
    "tcp": {"node_backend": "gloo", "inter_node_backend": "tcp"},
    "gloo": {"node_backend": "gloo", "inter_node_backend": "gloo"},
}
ALL_OPTIONS = [
    Options(way=way, combine=combine, combine_dtype=combine_dtype, dispatch_dtype=dispatch_dtype)
    for way in WAYS
    for combine, combine_dtype, dispatch_dtype in [
        ("node", "bfloat16", "float8"),
        ("exact", "bfloat16", "int8"),
        ("fixed", "bfloat16", "bfloat16"),
    ]
]


def scene_over_processes(
    topology: Topology, *, seed: int, num_topk: int, hidden: int, dtype: torch.dtype
) -> tuple[Batch, Placement]:
    """20 tokens, of which the last rank has none."""
    rng = np.random.default_rng(seed)
    batch = make_batch(
        rng, tokens=20, experts=10, num_topk=num_topk, hidden=hidden, dtype=dtype, skew=0.5
    )
    placement = make_placement(rng, topology, tokens=20, experts=10)
    tokens = list(placement.tokens)
    tokens[:2] = torch.cat([tokens[0], tokens[-1]]), tokens[1]
    tokens[-1] = tokens[-1][:0]
    return batch, replace(placement, tokens=tuple(tokens))


def replay(
    groups: ParallelGroups, scene: tuple[Batch, Placement], repeats: int, poisoned: bool
) -> dict[Options, set[str]]:
    """Hashes of all that was received and came home, of `repeats` exchanges on one dispatcher."""
    batch, placement = scene
    hashes = {}
    if poisoned:
        # From now on memory that torch allocates is full of NaN (integers: of the greatest number).
        torch.use_deterministic_algorithms(True)
    try:
        for options in ALL_OPTIONS:
            if options.way == "overlapped" and groups.topology.num_nodes == 1:
                continue  # one part, as hierarchical
            dispatcher = options.dispatcher(groups, placement, batch.x_NH.shape[1])
            hashes[options] = set()
            for _ in range(repeats):
                hashes[options].add(hashed(groups, dispatcher, batch, placement, poisoned))
    finally:
        torch.use_deterministic_algorithms(False)
    return hashes


def hashed(
    groups: ParallelGroups,
    dispatcher: TokenDispatcher,
    batch: Batch,
    placement: Placement,
    poisoned: bool,
) -> str:
    """One exchange, after which all memory within reach is spoiled if so wished."""
    digest = hashlib.sha256()
    mine = placement.input_of(groups.rank, batch)
    pending = dispatcher.start_dispatch(mine.x_TH, mine.slots_TK, mine.weights_TK, mine.range_T)
    outputs = []
    for part in pending:
        digest.update(part.x_RH[used_of(part)].view(torch.uint8).numpy().tobytes())
        digest.update(part.local_slots_RK.numpy().tobytes())
        outputs.append(placement.expert_outputs(part, groups.rank, batch))
        if poisoned:
            part.x_RH.fill_(math.nan)  # experts may work in place
    out_TH = dispatcher.start_combine(outputs, pending.handle).wait()
    digest.update(out_TH.view(torch.uint8).numpy().tobytes())
    if poisoned:
        for x in [*outputs, out_TH, mine.x_TH, mine.weights_TK]:
            x.fill_(math.nan)
        groups.world.barrier()
        groups.node.barrier()  # all have read what they need of my segments
        for group in (groups.world, groups.node, groups.rail, groups.tp):
            if isinstance(group, ShmGroup):
                poison_segment(group)
    return digest.hexdigest()


def poison_segment(group: ShmGroup) -> None:
    """NaN in both halves of my own segment, whatever the dtype of what comes there next."""
    segments = group._segments
    for half in (0, 1):
        start = segments.data_range(half)
        segments.memory[segments.idx][start : start + segments.capacity] = 0xFF


@pytest.mark.parametrize("nodes_and_ranks", [(1, 3), (3, 2)])
def test_replays_have_one_hash_poisoned_or_not(rank_pool, nodes_and_ranks: tuple[int, int]) -> None:
    """One node, where flat too goes over shared memory, and three; in fp32, which shows every bit.

    Both have three addends somewhere: two may be added in any order.
    """
    nodes, ranks = nodes_and_ranks
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks)
    scene = scene_over_processes(topology, seed=3, num_topk=6, hidden=130, dtype=torch.float32)
    plain = rank_pool.run(replay, topology, scene, 20, False)
    poisoned = rank_pool.run(replay, topology, scene, 4, True)
    for rank in range(topology.world_size):
        assert len(plain[rank]) >= 9
        for options, hashes in plain[rank].items():
            assert len(hashes) == 1, (rank, options)
            assert poisoned[rank][options] == hashes, (rank, options)


# --- two in flight ---------------------------------------------------------------------------------


def interleave(
    groups: ParallelGroups, scenes: list[tuple[Batch, Placement]]
) -> dict[Options, dict[str, list[Tensor]]]:
    """Outputs of two exchanges one by one, and with one under way during the other."""
    outs = {}
    for options in ALL_OPTIONS:
        placement = scenes[0][1]
        dispatcher = options.dispatcher(groups, placement, scenes[0][0].x_NH.shape[1])

        def start(scene, dispatcher=dispatcher):
            mine = scene[1].input_of(groups.rank, scene[0])
            return dispatcher.start_dispatch(
                mine.x_TH, mine.slots_TK, mine.weights_TK, mine.range_T
            )

        def compute(pending, scene):
            return [scene[1].expert_outputs(part, groups.rank, scene[0]) for part in pending]

        def send_home(outputs, pending, dispatcher=dispatcher):
            return dispatcher.start_combine(outputs, pending.handle)

        a, b = scenes
        alone = [exchange(groups, dispatcher, *scene)[1] for scene in scenes]

        sent_a, sent_b = start(a), start(b)
        outputs_a, outputs_b = compute(sent_a, a), compute(sent_b, b)
        home_a, home_b = send_home(outputs_a, sent_a), send_home(outputs_b, sent_b)
        stage_by_stage = [home_a.wait(), home_b.wait()]

        sent_a, sent_b = start(a), start(b)
        home_a = send_home(compute(sent_a, a), sent_a)
        home_b = send_home(compute(sent_b, b), sent_b)
        one_behind = [home_a.wait(), home_b.wait()]

        outs[options] = {
            "alone": alone,
            "stage by stage": stage_by_stage,
            "one behind": one_behind,
        }
    return outs


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_in_flight_do_not_mix(rank_pool, transport: str) -> None:
    """Other tokens, other counts and another top-k; experts in the same slots."""
    topology = Topology(num_nodes=2, ranks_per_node=2)
    a = scene_over_processes(topology, seed=1, num_topk=6, hidden=1030, dtype=torch.bfloat16)
    b = scene_over_processes(topology, seed=2, num_topk=3, hidden=1030, dtype=torch.bfloat16)
    b = (b[0], replace(b[1], slot_E=a[1].slot_E))
    answers = rank_pool.run(interleave, topology, [a, b], **TRANSPORTS[transport])
    for options in ALL_OPTIONS:
        for i, (batch, placement) in enumerate([a, b]):
            outs = {
                order: placement.by_token([of_rank[options][order][i] for of_rank in answers])
                for order in answers[0][options]
            }
            exact_NH = exact_sum(batch, options.dispatch_dtype)
            bound_NH = combine_bound(
                batch, topology, options.combine, options.combine_dtype, exact_NH
            )
            assert worst_excess(outs["alone"], exact_NH, bound_NH) <= 1, options
            assert equal(outs["stage by stage"], outs["alone"]), options
            assert equal(outs["one behind"], outs["alone"]), options


# --- each (token, node) crosses once ---------------------------------------------------------------

HOSTS = Topology(num_nodes=3, ranks_per_node=2)
LAYERS = 4
ADDRESS_BYTES = 4
SEGMENT_BYTES = 1448  # of an MTU of 1500 less IP (20) and TCP with timestamps (32)
HEADER_BYTES = 66  # those 52 and Ethernet's 14
FRAME_BYTES = 256  # more than what our transport puts before a part, once per part


@pytest.fixture(scope="module")
def hosted_ranks() -> Iterator[HostedRanks]:
    if reason := Testbed.available():  # not on import: ranks import this file too
        pytest.skip(reason)
    with (
        Testbed(HOSTS.num_nodes, None) as testbed,
        HostedRanks(testbed, HOSTS.ranks_per_node) as pool,
    ):
        yield pool


def count_crossings(
    groups: ParallelGroups, batch: Batch, placement: Placement, options: Options
) -> tuple[int, int]:
    """(bytes that my host sent, by the kernel; bytes between hosts that I sent, by the ledger)."""
    dispatcher = options.dispatcher(groups, placement, batch.x_NH.shape[1])
    groups.world.barrier()
    before = netns.counters(INTERFACE).tx_bytes
    groups.world.barrier()
    for _ in range(LAYERS):
        exchange(groups, dispatcher, batch, placement)
    groups.world.barrier()
    moved = netns.counters(INTERFACE).tx_bytes - before
    groups.world.barrier()
    return moved, dispatcher.ledger.inter_node_bytes()


def crossing_bytes(batch: Batch, placement: Placement, options: Options) -> tuple[list[int], int]:
    """Bytes of one layer that leave each host if each (token, node) crosses once; rows that cross."""
    topology, dtype, hidden = placement.topology, batch.x_NH.dtype, batch.x_NH.shape[1]
    wire = WireFormat(
        hidden=hidden,
        num_topk=batch.experts_NK.shape[1],
        dtype=dtype,
        codec=options.dispatch_dtype,
        num_slots=topology.world_size * placement.slots_per_rank,
    )
    there = wire.row_bytes + ADDRESS_BYTES
    codec_dtype = dtype if options.combine_dtype == "bfloat16" else torch.float32
    back = CODECS[options.combine_dtype].row_bytes(hidden, codec_dtype)
    leaving, rows = [0] * topology.num_nodes, 0
    ranks_NK = placement.ranks_of(batch.experts_NK)
    for rank, mine_T in enumerate(placement.tokens):
        home = topology.node_of(rank)
        for ranks_K in ranks_NK[mine_T].tolist():
            for node in {topology.node_of(r) for r in ranks_K if r >= 0} - {home}:
                leaving[home] += there
                leaving[node] += back
                rows += 1
    return leaving, rows


@pytest.mark.parametrize("codecs", [("bfloat16", "bfloat16"), ("float8", "logfmt10")])
def test_each_token_crosses_once_to_each_node(hosted_ranks, codecs: tuple[str, str]) -> None:
    """By the ledger exactly, by the kernel up to headers; flat sends once per rank, and it shows.

    TCP sends at most one header per SEGMENT_BYTES of data and one at the end of each part, and
    acknowledges each with at most one header from the other side.
    """
    rng = np.random.default_rng(5)
    batch = make_batch(
        rng, tokens=110, experts=12, num_topk=8, hidden=3001, dtype=torch.bfloat16, missing=0.3
    )
    placement = make_placement(rng, HOSTS, tokens=110, experts=12)
    sizes = [len(mine_T) for mine_T in placement.tokens]
    assert max(sizes) <= CAPACITY
    for way in WAYS:
        options = Options(
            way=way, combine="node", dispatch_dtype=codecs[0], combine_dtype=codecs[1]
        )
        answers = hosted_ranks.run(count_crossings, HOSTS, batch, placement, options)
        leaving, rows = crossing_bytes(batch, placement, options)
        assert rows > 150
        by_ledger = sum(ledger for _, ledger in answers)
        if way == "flat":
            assert by_ledger >= 1.3 * LAYERS * sum(leaving)
            continue
        assert by_ledger == LAYERS * sum(leaving)
        for node in range(HOSTS.num_nodes):
            # A layer's parts that leave: dispatch and combine, over each rail, to each other node;
            # and each barrier's, from each rank of the host to each rank elsewhere.
            rails, others = HOSTS.ranks_per_node, HOSTS.num_nodes - 1
            parts = LAYERS * 2 * rails * others + 4 * rails * rails * others
            sent = LAYERS * leaving[node]
            segments = LAYERS * sum(leaving) / SEGMENT_BYTES + 2 * parts
            bound = sent + parts * FRAME_BYTES + segments * HEADER_BYTES
            for rank in HOSTS.node_ranks(node):
                assert sent <= answers[rank][0] <= bound, (way, node)
