"""`expertmesh simulate serve`: what it says, writes and refuses."""

import json
import signal
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.simulate import serve_command
from simulations.serving.pareto import parse_concurrency

SMALL = (
    "--preset=mosaic",
    "--nodes=2",
    "--ranks-per-node=2",
    "--requests=60",
    "--rate=100",
    "--prompt=60:0.5",
    "--output=20:0.5",
)


def run(*arguments):
    result = CliRunner().invoke(app, ["simulate", "serve", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def saved(tmp_path, *arguments):
    file = tmp_path / "result.json"
    result = run(*SMALL, *arguments, "--json", str(file))
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    found.pop("steps_per_s")
    found.pop("command")  # pytest's
    return found, result.stdout


@pytest.mark.parametrize("policy", ["ours", "eplb", "none"])
def test_the_same_command_gives_the_same_result(tmp_path, policy):
    options = (f"--policy={policy}", "--fail=0.2:1:0.5", "--pareto=2,8", "--seed=3")
    first, _ = saved(tmp_path, *options)
    second, _ = saved(tmp_path, *options)
    assert json.dumps(first) == json.dumps(second)
    other, _ = saved(tmp_path, *options, "--seed=4")
    assert other["ttft_s"] != first["ttft_s"]


def test_the_result_says_what_happened(tmp_path):
    found, shown = saved(tmp_path, "--fail=0.2:1:0.5")
    requests = found["requests"]
    assert requests["submitted"] == requests["finished"] == 60
    assert requests["rejected"] == requests["failed"] == 0
    assert [event["kind"] for event in found["events"]][:2] == ["failure", "recovery"]
    assert found["cdf"]["q"] == list(range(101))
    for name in ("ttft_s", "tpot_s"):
        curve, spread = found["cdf"][name], found[name]
        assert curve == sorted(curve)
        assert [curve[50], curve[90], curve[99]] == [spread[q] for q in ("p50", "p90", "p99")]
    rates = found["throughput"]
    assert rates["tokens_per_s_per_rank"] == pytest.approx(rates["output_tokens_per_s"] / 4)
    assert rates["tokens_per_s_per_user"] == pytest.approx(1 / found["tpot_s"]["mean"])
    series = found["series"]
    assert len({len(line) for line in series.values()}) == 1
    assert len(series["time_s"]) <= 400
    assert series["time_s"][-1] == pytest.approx(found["duration_s"])
    width = found["duration_s"] / len(series["time_s"])
    emitted = sum(series["output_tokens_per_s"]) * width
    assert emitted == pytest.approx(rates["output_tokens_per_s"] * found["duration_s"])
    assert "interrupted" not in found
    assert max(map(len, shown.splitlines()[1:])) <= 80
    assert "60 finished" in shown


def test_policies_differ_in_how_even_ranks_are(tmp_path):
    """Ours starts where it would have put the experts, or moves them there from where they load."""

    def balancedness(*options):
        found, _ = saved(tmp_path, "--rate=20", "--requests=200", "--skew=1.5", *options)
        line = found["series"]["balancedness"]
        third = len(line) // 3
        return found, sum(line[:third]) / third, sum(line[third:-third]) / (len(line) - 2 * third)

    _, _, none = balancedness("--policy=none")
    _, _, eplb = balancedness("--policy=eplb")
    _, _, ours = balancedness("--policy=ours")
    moved, first_cold, cold = balancedness("--policy=ours", "--cold-start")
    assert none + 0.05 < eplb < ours
    assert first_cold < cold
    assert none + 0.05 < cold
    assert [event["kind"] for event in moved["events"]][:1] == ["rebalance"]


def test_more_users_get_more_out_of_a_rank_and_less_each(tmp_path):
    found, _ = saved(tmp_path, "--pareto=1,4,16", "--prompt=64", "--output=32")
    points = found["pareto"]
    assert [point["concurrency"] for point in points] == [1, 4, 16]
    ranks = [point["tokens_per_s_per_rank"] for point in points]
    users = [point["tokens_per_s_per_user"] for point in points]
    assert ranks == sorted(ranks)
    assert users == sorted(users, reverse=True)
    # One user: every step of the closed loop is theirs, the prompt's and 31 more.
    one = points[0]
    seconds = one["ttft_p50_s"] + 31 / one["tokens_per_s_per_user"]
    assert one["tokens_per_s_per_rank"] * 4 == pytest.approx(32 / seconds, rel=1e-6)


def test_memory_is_that_of_the_blocks_in_use(tmp_path):
    found, _ = saved(tmp_path)
    memory, cluster = found["memory"], found["cluster"]
    assert sum(v for k, v in memory.items() if k not in ("capacity", "free")) == pytest.approx(
        memory["capacity"] - memory["free"]
    )
    assert memory["kv"] % (cluster["num_blocks"] * cluster["block_size"]) == 0
    assert memory["free"] < memory["kv"] / cluster["num_blocks"]


def test_it_says_why_requests_were_refused(tmp_path):
    found, shown = saved(tmp_path, "--prompt=100", "--max-model-len=90", "--requests=7")
    assert found["requests"]["rejected"] == 7
    [warning] = [text for text in found["warnings"] if "refused" in text]
    assert "requests refused: 7" in warning
    assert "the prompt has 100 tokens; must have at most max_model_len - 1 = 89" in warning
    assert found["ttft_s"]["mean"] is None
    assert "7 rejected" in shown


def test_a_trace_is_served(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "0.5,30,4\n" * 7)
    found, _ = saved(tmp_path, f"--trace={trace}", "--requests=5")
    assert found["requests"]["finished"] == 5
    assert found["workload"]["arrivals"] == "trace"
    rate, seconds = found["throughput"]["output_tokens_per_s"], found["duration_s"]
    assert rate * seconds == pytest.approx(20)


BAD = {
    "--preset=gpt-5": "unknown preset 'gpt-5'",
    "--policy=best": "unknown policy 'best': choose from ours, eplb, none",
    "--workload=odd": "unknown workload 'odd'",
    "--overlap=three": "overlap must be one of",
    "--weights=int1": "weights must be one of",
    "--calibration=none": "unknown calibration 'none'",
    "--arrivals=never": "unknown arrivals 'never': choose from poisson, bursts, closed",
    "--rate=-1": "rate must be a positive number",
    "--rate=nan": "rate must be a positive number",
    "--requests=0": "--requests must be from 1",
    "--duration=-3": "not both",
    "--prompt=x": "'x' is not MEAN or MEAN:SPREAD",
    "--output=-4": "a mean length must be from 1",
    "--nodes=0": "at least one node",
    "--tp=3": "tensor_parallel_size must divide ranks_per_node",
    "--redundant-experts=3": "(32 + 3) % 4 = 3",
    "--redundant-experts=-4": "must be >= 0",
    "--max-num-seqs=0": "max_num_seqs must be at least 1",
    "--max-num-batched-tokens=8": "max_num_batched_tokens = 8 < max_num_seqs = 128",
    "--max-num-queued-reqs=0": "max_num_queued_reqs must be at least 1",
    "--block-size=0": "block_size must be at least 1",
    "--max-model-len=1": "max_model_len must be at least 2",
    "--fail=5": "'5' is not TIME:RANK",
    "--fail=5:9": "rank 9 cannot fail",
    "--pareto=8,x": "'8,x' is not a list of numbers of users",
    "--skew=-1": "skew must be",
    "--jitter=9": "jitter must be",
    "--trace=/nowhere/trace.csv": "No such file",
    "--concurrency=0": "--concurrency must be at least 1",
    "--seed=-1": "--seed must be at least 0",
}


@pytest.mark.parametrize("option", BAD)
def test_bad_input_is_refused_in_one_line(tmp_path, option):
    file = tmp_path / "result.json"
    result = run(*SMALL, option, "--json", str(file))
    assert result.exit_code == 2
    assert BAD[option] in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    assert not file.exists()


def test_a_model_that_does_not_fit_is_refused_saying_by_how_much():
    result = run("--preset=deepseek-v3", "--nodes=1")
    assert result.exit_code == 2
    assert "GB too much" in result.stderr
    assert result.stderr.count("\n") == 1


def test_interrupted_it_writes_what_is_done(tmp_path, monkeypatch):
    @contextmanager
    def ctrl_c_after_ten_steps(num_requests, simulation):
        yield (
            lambda: (
                signal.raise_signal(signal.SIGINT) if simulation.record.num_steps == 10 else None
            )
        )

    monkeypatch.setattr(serve_command, "_progress", ctrl_c_after_ten_steps)
    file = tmp_path / "result.json"
    result = run(*SMALL, "--pareto=4", "--json", str(file))
    assert result.exit_code == 130
    assert "interrupted: this is what was done until then" in result.stdout
    found = json.loads(file.read_text())
    assert found["interrupted"] is True
    assert found["steps"] == 10
    assert found["requests"]["finished"] < 60
    assert found["pareto"] == []


def test_numbers_of_users():
    assert parse_concurrency(" 8,4,4 ") == (4, 8)
