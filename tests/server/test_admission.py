"""Which replica gets a request."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.server.admission import Admission

BLOCK = 4


@dataclass
class Replica:
    idx: int
    in_flight: int = 0
    kv_usage: float = 0.0
    suspect: bool = False


def prompt(name: int, num_blocks: int = 10) -> list[int]:
    """A prompt of its own, of so many whole blocks and a token."""
    return [1000 * name + idx for idx in range(num_blocks * BLOCK + 1)]


replicas = st.lists(
    st.tuples(st.integers(0, 50), st.floats(0, 1), st.booleans()), min_size=1, max_size=8
).map(lambda rows: [Replica(idx, *row) for idx, row in enumerate(rows)])


@given(replicas)
def test_without_prefixes_the_least_loaded_one_gets_it(candidates) -> None:
    for replica in candidates:
        replica.kv_usage = 0.5
    expected = min(candidates, key=lambda r: (r.suspect, r.in_flight, r.idx))
    assert Admission(BLOCK).choose(candidates, prompt(0)) is expected
    assert Admission().choose(candidates) is expected


@given(replicas, st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), max_size=20))
def test_whatever_is_cached_replicas_stay_about_even(candidates, history) -> None:
    """The chosen one has at most twice the slack more than the least loaded: nobody starves."""
    admission = Admission(BLOCK)
    for where, name in history:
        admission.sent(where, prompt(name))
    chosen = admission.choose(candidates, prompt(0))
    heard = [r for r in candidates if not r.suspect]
    if heard:
        slack = 1 + sum(r.in_flight for r in candidates) / (2 * len(candidates))
        assert not chosen.suspect
        assert chosen.in_flight <= min(r.in_flight for r in heard) + 2 * slack


@given(st.lists(st.integers(0, 40), min_size=1, max_size=300), st.integers(1, 4))
def test_a_popular_prefix_does_not_pile_up(names, num_replicas) -> None:
    """Sent one after the other with none ending, even one single prompt spreads over all replicas."""
    admission, candidates = Admission(BLOCK), [Replica(idx) for idx in range(num_replicas)]
    for name in names:
        admission.choose(candidates, prompt(name % 3)).in_flight += 1
    loads = [r.in_flight for r in candidates]
    assert max(loads) <= 2 + 2 * (sum(loads) / len(loads))


def test_a_prompt_goes_where_its_beginning_is() -> None:
    admission, candidates = Admission(BLOCK), [Replica(idx) for idx in range(3)]
    admission.sent(2, prompt(1))
    assert admission.choose(candidates, [*prompt(1)[: 6 * BLOCK], 7, 7, 7]).idx == 2
    assert admission.choose(candidates, prompt(2)).idx == 0


def test_the_longest_cached_beginning_wins() -> None:
    admission, candidates = Admission(BLOCK), [Replica(idx) for idx in range(3)]
    admission.sent(1, prompt(1, 3))
    admission.sent(2, prompt(1, 9))
    admission.sent(0, prompt(5, 9))
    assert admission.choose(candidates, prompt(1), output_tokens=100).idx == 2


@pytest.mark.parametrize(("output_tokens", "expected"), [(100, 0), (4, 1)])
def test_a_few_cached_tokens_do_not_outweigh_a_long_answer(output_tokens, expected) -> None:
    admission, candidates = Admission(BLOCK), [Replica(0), Replica(1, in_flight=1)]
    admission.sent(1, prompt(1, 2))
    assert admission.choose(candidates, prompt(1, 2), output_tokens=output_tokens).idx == expected


def test_other_salts_share_nothing() -> None:
    admission, candidates = Admission(BLOCK), [Replica(0), Replica(1)]
    admission.sent(1, prompt(1), cache_salt="alice")
    assert admission.choose(candidates, prompt(1), cache_salt="alice").idx == 1
    assert admission.choose(candidates, prompt(1), cache_salt="bob").idx == 0


def test_one_whose_blocks_run_out_is_spared() -> None:
    candidates = [Replica(0, in_flight=4, kv_usage=0.97), Replica(1, in_flight=5, kv_usage=0.5)]
    assert Admission().choose(candidates).idx == 1
    candidates[1].kv_usage = 1.0
    assert Admission().choose(candidates).idx == 0


def test_what_was_lost_is_forgotten() -> None:
    admission, candidates = Admission(BLOCK), [Replica(0), Replica(1), Replica(2)]
    for where in (1, 2):
        admission.sent(where, prompt(1))
    admission.forget(1)
    assert admission.choose(candidates, prompt(1)).idx == 2
    admission.forget()
    assert admission.num_blocks == 0


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    admission, candidates = Admission(BLOCK, max_blocks=25), [Replica(0), Replica(1)]
    for name in range(1, 8):
        admission.sent(1, prompt(name))
        assert admission.num_blocks <= 25
    assert admission.choose(candidates, prompt(7)).idx == 1
    assert admission.choose(candidates, prompt(1)).idx == 0


def test_nobody_to_choose_from() -> None:
    with pytest.raises(ValueError, match="empty"):
        Admission().choose([])
