"""`expertmesh rebalance`: the plan's effect, the watching, and an exit code for every end."""

import json
import signal
import threading

import grpc
import pytest
from rich.console import Console

from cluster.server.client import Client
from cluster.server.proto.expertmesh.v1 import control_pb2 as pb
from deploy.rebalance import WatchError, rebalance_command, watch
from deploy.rebalance_effect import Outcome, ranges, size
from deploy.server_options import Server
from tests.deploy.fake_control import FakeControl, serving, wait_until
from tests.deploy.processes import EXPERTMESH, running

MIB = 2**20


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def control():
    made = FakeControl()
    made.plan = pb.RebalanceResponse(
        started=True,
        epoch=7,
        layers=[
            effect(1, 1.5, 1.01, 3),
            effect(2, 1.01, 1.01, 0),
            effect(3, 1.02, 1.02, 0),
            effect(4, 1.23, 1.0, 1),
        ],
        bytes=4 * 24 * MIB,
        reason="worst imbalance 1.500 -> 1.020",
    )
    return made


def effect(layer, before, after, moves):
    return pb.LayerEffect(
        layer=layer,
        imbalance_before=before,
        imbalance_after=after,
        lower_bound=1.0,
        moves=moves,
        bytes=moves * 24 * MIB,
        reason=f"[bold] reason {layer}",
    )


def ask(endpoint, token_file=None, **options):
    given = {"dry_run": False, "target": None, "from_scratch": False} | options
    given = {"json_file": None} | given
    return rebalance_command(Server(endpoint, admin_token_file=token_file), **given)


def cells(line):
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_dry_run_shows_the_effect_and_starts_nothing(control, capsys, tmp_path):
    control.plan.started = False
    with serving(control) as endpoint:
        assert ask(endpoint, dry_run=True, target=1.02, json_file=tmp_path / "r.json") == 0
    assert control.requests == [pb.RebalanceRequest(dry_run=True, target=1.02, from_scratch=False)]
    output = capsys.readouterr().out
    table = [cells(line) for line in output.splitlines() if line.startswith("│")]
    assert table == [
        ["1", "1.500", "1.010", "1.000", "3", "72.0", "[bold] reason 1"],
        ["4", "1.230", "1.000", "1.000", "1", "24.0", "[bold] reason 4"],
        ["2-3", "1.020", "1.020", "1.000", "0", "0.0", "[bold] reason 3"],
    ]
    assert "mean imbalance 1.190 -> 1.010, worst 1.500 -> 1.020" in output
    assert "experts to move: 4, 96.0 MiB" in output
    assert "nothing was changed: worst imbalance" in output
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["started"], report["bytes"], report["outcome"]) == (False, 96 * MIB, None)
    assert report["layers"]["1"]["imbalance_before"] == 1.5


def test_it_watches_to_the_end(control, capsys, tmp_path):
    control.balance.rebalances.abandoned = 2  # earlier ones
    with serving(control) as endpoint:
        assert ask(endpoint, from_scratch=True, json_file=tmp_path / "r.json") == 0
    output = capsys.readouterr().out
    assert not control.requests[0].HasField("target")
    positions = [output.index(doing) for doing in control.doings]
    assert positions == sorted(positions)
    assert "finished: experts moved: 4, 96.0 MiB in 1.5 s" in output
    assert json.loads((tmp_path / "r.json").read_text())["outcome"]["finished"]


def test_abandoned_is_a_failure(control, capsys, tmp_path):
    control.abandons = "rank 2 has not prepared layer 4 within 30 s"
    control.balance.rebalances.abandoned = 3  # earlier ones
    with serving(control) as endpoint:
        assert ask(endpoint, json_file=tmp_path / "r.json") == 1
    assert (
        "abandoned: rank 2 has not prepared layer 4 within 30 s; experts moved: 1, 24.0 MiB"
        in capsys.readouterr().out
    )
    outcome = json.loads((tmp_path / "r.json").read_text())["outcome"]
    assert (outcome["finished"], outcome["error"]) == (False, control.abandons)


def test_an_earlier_rebalance_is_not_taken_for_ours(control, capsys):
    control._left = ["an earlier one", "still the earlier one"]
    control.balance.rebalances.running = True
    with serving(control) as endpoint:
        assert ask(endpoint) == 0
    assert "earlier" not in capsys.readouterr().out
    assert control.balance.rebalances.finished == 2


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, 1),
        (grpc.StatusCode.INTERNAL, 1),
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.PERMISSION_DENIED, 2),
        (grpc.StatusCode.UNIMPLEMENTED, 2),
    ],
)
def test_a_refusal_says_why(control, capsys, code, exit_code):
    control.refusal = (code, "not enough load recorded yet: 3 tokens")
    with serving(control) as endpoint:
        assert ask(endpoint) == exit_code
    error = capsys.readouterr().err
    assert f"{endpoint}: {code.name}: not enough load recorded yet: 3 tokens" in error


def test_admin_token(control, capsys, tmp_path):
    control.plan.started = False
    control.token = "sesame"
    token_file = tmp_path / "token"
    with serving(control) as endpoint:
        assert ask(endpoint) == 2
        assert "--admin-token-file" in capsys.readouterr().err
        assert ask(endpoint, token_file=token_file) == 2
        assert "cannot be read" in capsys.readouterr().err
        for bad in ("", "naïve", "two\nlines"):
            token_file.write_text(bad)
            assert ask(endpoint, token_file=token_file) == 2
            assert "holds no token" in capsys.readouterr().err
        token_file.write_text("sesame\n")
        assert ask(endpoint, token_file=token_file) == 0


@pytest.mark.parametrize("target", [0.99, float("nan"), float("inf")])
def test_impossible_target(capsys, target):
    assert ask("127.0.0.1:1", target=target) == 2
    assert "--target" in capsys.readouterr().err


def test_a_server_that_loses_track_or_dies_is_given_up(control):
    control.balance.rebalances.started = 1
    with serving(control) as endpoint:
        calls = Client(endpoint, timeout_s=1)
        with pytest.raises(WatchError, match="no rebalance is running and that none has ended"):
            watch(Console(), calls, pb.RebalanceStats(), lost_s=0.2)
    with pytest.raises(WatchError, match="does not answer"):
        watch(Console(), calls, pb.RebalanceStats(), lost_s=0.2)
    calls.close()


def test_a_busy_server_is_not_given_up(control):
    control.balance.rebalances.running = True
    control._left = ["layer 1"] * 5
    with serving(control) as endpoint, Client(endpoint) as calls:
        assert watch(Console(), calls, pb.RebalanceStats(), lost_s=0.3).finished == 1


def test_watching_survives_a_gap(control):
    control.balance.rebalances.running = True
    ended = []
    with serving(control) as endpoint:
        calls = Client(endpoint, timeout_s=1)
        watching = threading.Thread(
            target=lambda: ended.append(watch(Console(), calls, pb.RebalanceStats(), 20))
        )
        watching.start()
    control.balance.rebalances.finished = 1
    with serving(control, int(endpoint.rpartition(":")[2])):
        watching.join(20)
    assert [stats.finished for stats in ended] == [1]
    calls.close()


def test_ctrl_c_ends_the_watching_only(control):
    control.doings = ["layer 1"] * 1000
    with serving(control) as endpoint:
        with running([EXPERTMESH, "rebalance", "--endpoint", endpoint]) as command:
            command.wait_for("layer 1", 20)
            command.signal(signal.SIGINT)
            assert command.wait(20) == 130
        assert "stopped watching; the rebalance goes on" in command.output
        assert "Traceback" not in command.output
        wait_until(lambda: control.balance.rebalances.running)


def test_ranges():
    assert ranges([5, 3, 4, 9, 11, 12]) == "3-5, 9, 11-12"
    assert ranges([]) == ""


@pytest.mark.parametrize(
    ("num_bytes", "told"),
    [(0, "0 MiB"), (2**19, "0.5 MiB"), (308 * MIB, "308 MiB"), (790e9, "736 GiB")],
)
def test_sizes(num_bytes, told):
    assert size(num_bytes) == told


def test_outcome_without_a_reason():
    after = pb.RebalanceStats(abandoned=1)
    outcome = Outcome.between(pb.RebalanceStats(), after, pb.RebalanceResponse())
    assert str(outcome).startswith("abandoned: the server gave no reason")
