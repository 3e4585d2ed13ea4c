"""Workloads as streams: their statistics against closed forms and exact draws, and their files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.gate import GateConfig
from router.load import LoadFileError, LoadWindow
from router.load_files import dump_window
from simulations.balance import expert_loads
from simulations.balance.expert_loads import SyntheticLoads, counts_of
from simulations.balance.load_shares import WORKLOADS, LoadShape, Workload, limited, make_shares
from simulations.balance.load_sources import RecordedTokens, recorded_loads
from simulations.balance.token_rows import sample_rows

SHAPE = LoadShape(num_layers=3, num_experts=32, num_nodes=4)
GATE = GateConfig(num_experts=32, num_experts_per_token=4)


def loads_of(name, tokens=64, seed=0, **more):
    workload = Workload(name=name, **more)
    return SyntheticLoads(workload, SHAPE, GATE, tokens=tokens, seed=[seed, 0])


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("tokens", [64, 4096])
def test_every_batch_has_all_tokens_however_it_is_asked_for(name, tokens):
    counts = loads_of(name, tokens).counts(0, 12)
    assert counts.shape[1] == (4 if name == "node_skew" else 1)
    assert (counts.sum(axis=(1, 3)) == tokens * 4).all()
    assert (counts.sum(axis=3) == counts.sum(axis=3)[0, 0, 0]).all()  # every origin alike
    assert (counts >= 0).all()
    again = loads_of(name, tokens)
    parts = [again.counts(0, 5), again.counts(5, 6), again.counts(6, 12)]
    assert (np.concatenate(parts) == counts).all()
    assert (loads_of(name, tokens, seed=1).counts(0, 12) != counts).any()


@pytest.mark.parametrize("many", [0, 10**9], ids=["normal", "multinomial"])
def test_counts_have_the_moments_of_a_multinomial(monkeypatch, many):
    """Mean n p, variance n p (1 - p), covariance - n p q; bounds are 5 standard errors."""
    monkeypatch.setattr(expert_loads, "MANY", many)
    share = np.array([0.5, 0.25, 0.125, 0.1, 0.025])
    batches, pairs = 20000, 2000
    counts = counts_of(np.random.default_rng(3), pairs, np.tile(share, (batches, 1)))
    assert (counts.sum(axis=1) == pairs).all()
    variance = pairs * share * (1 - share)
    error = np.sqrt(variance / batches)
    assert (np.abs(counts.mean(axis=0) - pairs * share) < 5 * error + 0.05).all()
    assert counts.var(axis=0) == pytest.approx(variance + 1 / 8 * (many == 0), rel=0.06)
    covariance = np.cov(counts.T)[0, 1]
    assert covariance == pytest.approx(-pairs * share[0] * share[1], rel=0.06)


def test_fullest_rank_of_large_batches_as_an_exact_draw_would_have_it(monkeypatch):
    """What balance depends on: the maximum over 64 ranks of 4 experts each."""
    share = np.random.default_rng(0).lognormal(0, 1, 256)
    shares = np.tile(share / share.sum(), (3000, 1))

    def fullest(many):
        monkeypatch.setattr(expert_loads, "MANY", many)
        counts = counts_of(np.random.default_rng(many), 65536, shares)
        return counts.reshape(3000, 64, 4).sum(axis=2).max(axis=1)

    near, exact = fullest(1), fullest(10**9)
    assert near.mean() == pytest.approx(exact.mean(), abs=5 * exact.std() / np.sqrt(1500))
    assert near.std() == pytest.approx(exact.std(), rel=0.08)


def test_uniform_load_has_the_published_imbalance():
    """Uniform routing, 64 ranks of 4 experts, 128 tokens each, top-8: max / mean 1.074."""
    shape = LoadShape(num_layers=8, num_experts=256, num_nodes=8)
    gate = GateConfig(num_experts=256, num_experts_per_token=8)
    workload = Workload(name="uniform", jitter=0)
    counts = SyntheticLoads(workload, shape, gate, tokens=8192, seed=[0]).counts(0, 50)
    rank = counts.reshape(50, 8, 64, 4).sum(axis=3)
    assert (rank.max(axis=2) / 1024).mean() == pytest.approx(1.074, abs=0.003)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0, 4))
def test_shares_are_limited_and_keep_their_order(seed, top_k, spread):
    load = np.random.default_rng(seed).lognormal(0, spread, (3, 12))
    share = limited(load, 1 / top_k)
    assert share.sum(axis=1) == pytest.approx(np.ones(3))
    assert share.max() <= (1 / top_k) * (1 + 1e-9)
    order = np.argsort(load, axis=1)
    assert (np.diff(np.take_along_axis(share, order, axis=1)) >= -1e-12).all()
    free = share < 1 / top_k * (1 - 1e-9)  # those below the limit stay in proportion
    for row, own, part in zip(load, free, share, strict=True):
        if own.any():
            assert part[own] / part[own].sum() == pytest.approx(row[own] / row[own].sum())


def test_shares_over_time():
    def at(name, *steps, **more):
        shares = make_shares(Workload(name=name, **more), SHAPE, [1])
        return [np.array(shares.at(step)) for step in steps]

    first, same, other = at("task_shift", 0, 9, 10, shift_every=10)
    assert (first == same).all()
    assert (first != other).all()
    first, same, other = at("burst", 0, 9, 10, shift_every=10)
    assert (first == same).all()
    assert (first != other).sum() in (3 * 2, 2 * 2, 2)  # one expert of a layer cools, one gets hot
    assert (limited(first, 1 / 4).max(axis=2) == 1 / 4).all()  # hot: in every token's choice
    first, later = at("zipf", 0, 10**6)
    assert (first == later).all()
    assert np.sort(first)[0, 0, ::-1] == pytest.approx(1 / np.arange(1, 33))
    even = at("uniform", 0)[0]
    assert (even == even[0, 0, 0]).all()


def test_drift_has_its_correlation_and_spread():
    shape = LoadShape(num_layers=40, num_experts=256, num_nodes=1)
    shares = make_shares(Workload(name="drift", skew=0.7, rho=0.6), shape, [0])
    first, later = np.log(shares.at(0)), np.log(shares.at(100))
    assert first.std() == pytest.approx(0.7, rel=0.03)
    assert later.std() == pytest.approx(0.7, rel=0.03)
    assert np.corrcoef(first.ravel(), later.ravel())[0, 1] == pytest.approx(0.6, abs=0.03)


def test_node_skew_tells_nodes_apart_by_its_part():
    common, skewed = (
        make_shares(Workload(name="node_skew", skew=skew), SHAPE, [0]).at(0) for skew in (0.0, 0.8)
    )
    assert common[0].sum(axis=1) == pytest.approx(np.ones(3))
    assert (common == common[0]).all()
    assert (skewed[0] != skewed[1]).all()


def test_tokens_choose_experts_by_their_shares_and_none_twice():
    share = limited(np.random.default_rng(0).lognormal(0, 1, (1, 2, 32)), 1 / 4)
    rows = sample_rows(np.random.default_rng(1), share, GATE, 20000)
    assert rows.shape == (1, 2, 20000, 4)
    assert (np.diff(np.sort(rows, axis=3), axis=3) > 0).all()
    for layer in range(2):
        chosen = np.bincount(rows[0, layer].ravel(), minlength=32) / 20000
        # bundles of 4 tokens use one order: at most as uncertain as a fourth of the tokens
        error = np.sqrt(4 * share[0, layer] * (1 - 4 * share[0, layer]) / 5000)
        assert (np.abs(chosen - 4 * share[0, layer]) < 5 * error + 1e-9).all()


def test_tokens_keep_to_the_gates_groups():
    gate = GateConfig(num_experts=32, num_experts_per_token=4, num_groups=8, num_groups_per_token=2)
    share = limited(np.ones((2, 3, 32)), 1 / 4)
    rows = sample_rows(np.random.default_rng(1), share, gate, 999)
    assert rows.shape == (2, 3, 999, 4)
    groups = np.sort(rows // 4, axis=3)
    assert ((np.diff(groups, axis=3) > 0).sum(axis=3) <= 1).all()
    assert (np.bincount(rows.ravel(), minlength=32) / rows.size * 32).min() > 0.8


# Files ------------------------------------------------------------------------------------------


def routing(rng, tokens=600):
    keys = rng.random((tokens, 3, 32))
    return np.argsort(keys, axis=2)[:, :, :4].astype(np.uint8)


def read(path, order="mixed", **more):
    options = {"tokens": 64, "shift_every": 10, "jitter": 0.0, "seed": [0, 0]} | more
    return recorded_loads(path, SHAPE, GATE, order=order, **options)


def test_recorded_tokens_are_what_is_served(tmp_path):
    rng = np.random.default_rng(0)
    low, high = routing(rng) // 2, routing(rng) // 2 + 16  # experts below 16, and from 16 on
    np.savez(tmp_path / "t.npz", low=low, high=high)
    mixed, shifting, by_node = (
        read(tmp_path / "t.npz", order) for order in ("mixed", "task_shift", "node_skew")
    )
    counts = mixed.counts(0, 50)
    assert (counts.sum(axis=3) == 256).all()
    of_low = counts[..., :16].sum() / counts.sum()
    assert of_low == pytest.approx(0.5, abs=0.05)
    counts = shifting.counts(0, 20)
    assert not counts[:10, ..., 16:].any()
    assert not counts[10:, ..., :16].any()
    counts = by_node.counts(0, 2)
    assert counts.shape == (2, 4, 3, 32)
    assert not counts[:, 0::2, :, 16:].any()
    assert not counts[:, 1::2, :, :16].any()
    rows = by_node.rows(0, 5)
    assert rows.shape == (4, 3, 5, 4)
    assert rows[0].max() < 16 <= rows[1].min()
    known = {tuple(row) for row in low.reshape(-1, 4).tolist()}
    assert {tuple(row) for row in rows[0].reshape(-1, 4).tolist()} <= known


def test_frequencies_of_recorded_tokens():
    ids = routing(np.random.default_rng(1))
    loads = RecordedTokens({"one": ids}, 32, tokens=2000, num_nodes=1, seed=[0])
    counts = loads.counts(0, 20).sum(axis=(0, 1))
    for layer in range(3):
        expected = np.bincount(ids[:, layer].ravel(), minlength=32) / len(ids)
        assert counts[layer] / 40000 == pytest.approx(expected, abs=0.02)


def test_recorded_counts_are_shares_that_change_as_they_did(tmp_path):
    counts = np.zeros((2, 3, 32))
    counts[0, :, :8], counts[1, :, 8:24] = 1, 5
    counts[1, 2] = 0  # nothing recorded: even
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"logical_count": counts.tolist()}))
    torch.save({"logical_count": torch.tensor(counts)}, tmp_path / "c.pt")
    for path in (file, tmp_path / "c.pt"):
        served = read(path).counts(0, 3)[:, 0]
        assert (served.sum(axis=2) == 256).all()
        assert not served[0, :, 8:].any()
        assert not served[1, :2, :8].any()
        assert (served[1, 2] > 0).sum() > 24
        assert not served[2, :, 8:].any()  # begins again
    window = LoadWindow(3, 32)
    window.add(counts[0])
    (tmp_path / "w.npz").write_bytes(dump_window(window))
    assert not read(tmp_path / "w.npz").counts(0, 5)[..., 8:].any()


def test_files_of_another_model_or_none(tmp_path):
    path = tmp_path / "t.npz"
    np.savez(path, one=routing(np.random.default_rng(0))[:, :2])
    with pytest.raises(LoadFileError, match="of 2 layers, up to 31, top-4; the model has 3 layers"):
        read(path)
    np.savez(path, one=np.full((9, 3, 4), 32, dtype=np.uint8))
    with pytest.raises(LoadFileError, match="up to 32, top-4; the model has 3 layers of 32 expert"):
        read(path)
    np.savez(path, one=routing(np.random.default_rng(0)))
    with pytest.raises(ValueError, match="unknown workload 'zipf' of a trace: choose from mixed"):
        read(path, "zipf")
    with pytest.raises(ValueError, match=r"must divide over nodes: 66 % 4 = 2"):
        read(path, "node_skew", tokens=66)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(LoadFileError, match=r"not a \.npz file"):
        read(path)
    dump = tmp_path / "c.json"
    dump.write_text(json.dumps({"logical_count": [[[1.0] * 32] * 2]}))
    with pytest.raises(LoadFileError, match="counts of 2 layers of 32 experts; the model has 3"):
        read(dump)
    dump.write_text(json.dumps({"logical_count": [[[1.0] * 32] * 3]}))
    with pytest.raises(LoadFileError, match="counts tell no tasks apart"):
        read(dump, "task_shift")
    for counts in ([[[-1.0] * 32] * 3], [[[0.0] * 32] * 3], [[[1e16] * 32] * 3]):
        dump.write_text(json.dumps({"logical_count": counts}))
        with pytest.raises(LoadFileError, match="counts must be from 0 to 1e"):
            read(dump)
    for missing in ("missing.npz", "missing.json"):
        with pytest.raises(LoadFileError, match="No such file"):
            read(tmp_path / missing)
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(LoadFileError, match=r"unknown kind '\.csv'"):
        read(tmp_path / "x.csv")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read(tmp_path_factory, data):
    """Bytes cut off and flipped: a LoadFileError that names the file, or batches; nothing else."""
    directory = tmp_path_factory.mktemp("damaged")
    kind = data.draw(st.sampled_from(["npz", "json", "pt"]))
    path = directory / f"t.{kind}"
    if kind == "npz":
        np.savez(path, one=routing(np.random.default_rng(0), 20))
    elif kind == "json":
        path.write_text(json.dumps({"logical_count": [[[1.0] * 32] * 3]}))
    else:
        torch.save({"logical_count": torch.ones(2, 3, 32)}, path)
    content = bytearray(path.read_bytes()[: data.draw(st.integers(0, 4000))])
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        loads = read(path)
    except LoadFileError as error:
        refusal = str(error)
    else:
        assert loads.counts(0, 1).sum() <= 3 * 256
        return
    assert path.name in refusal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sinus"}, "unknown workload 'sinus': choose from uniform, lognormal|lognormal"),
        ({"skew": -1.0}, "skew must be from 0 to 5, got -1"),
        ({"name": "node_skew", "skew": 1.5}, "skew must be from 0 to 1, got 1.5"),
        ({"jitter": float("nan")}, "jitter must be from 0 to 2, got nan"),
        ({"rho": 1.5}, "rho.1.5. must be from 0 to 1"),
        ({"shift_every": 0}, "shift_every.0. >= 1"),
    ],
)
def test_workloads_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Workload(**options)
