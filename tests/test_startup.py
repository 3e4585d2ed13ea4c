"""Waiting for ranks: how far they are, who is late, and that the first failure ends it."""

import asyncio

import pytest

from cluster.startup import Startup, StartupError


async def _says(rank):
    return f"loading, {100 + rank} MiB of memory"


async def _silent(rank):
    await asyncio.Event().wait()


async def _after(seconds, answer=None):
    await asyncio.sleep(seconds)
    return answer


def test_answers_come_in_the_order_of_ranks():
    async def run():
        startup = Startup(20, _says)
        return await startup.all_ranks("a stage", [_after(0.02, "a"), _after(0.0, "b")])

    assert asyncio.run(run()) == ["a", "b"]


def test_progress_names_those_that_are_waited_for_and_what_they_do():
    async def run():
        startup, released = Startup(60, _says), asyncio.Event()
        calls = [_after(0), released.wait(), _after(0), released.wait()]
        waiting = asyncio.ensure_future(startup.all_ranks("loading m", calls))
        while "MiB" not in startup.progress.detail:
            await asyncio.sleep(0.01)
        seen = startup.progress
        released.set()
        await waiting
        return seen

    seen = asyncio.run(run())
    assert seen.stage == "loading m"
    assert seen.detail.startswith("2 of 4 done after ")
    assert "waiting for rank 1 (loading, 101 MiB of memory), rank 3 (loading, 103" in seen.detail


@pytest.mark.parametrize("ask", [_says, _silent])
def test_the_deadline_names_late_ranks_only(ask):
    async def run():
        startup = Startup(0.3, ask)
        await startup.all_ranks("loading m", [_after(0), _after(3600), _after(0)])

    with pytest.raises(StartupError, match=r"1 of 3 ranks .* loading m within .* 0\.3 s: rank 1\b"):
        asyncio.run(run())


def test_stages_share_one_deadline():
    async def run():
        startup = Startup(0.4, _says)
        await startup.all_ranks("first", [_after(0.2)])
        await startup.all_ranks("second", [_after(0.3), _after(0)])

    with pytest.raises(StartupError, match=r"1 of 2 ranks were not done with second"):
        asyncio.run(run())


def test_the_first_failure_ends_it_with_what_the_rank_raised():
    async def fails():
        raise ValueError("model.safetensors is damaged")

    async def run():
        await Startup(3600, _says).all_ranks("loading m", [_after(3600), fails()])

    with pytest.raises(ValueError, match="damaged"):
        asyncio.run(run())
