"""Lines of the log: the same fields in every process, ids of requests, and files beside stderr."""

import json
import logging
import re
from datetime import UTC, datetime

import pytest

from cluster import logs
from cluster.config import ConfigError, ObservabilityConfig


@pytest.fixture
def configure(capsys):
    """Configures, and gives a function that returns the lines written to stderr since."""
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, (*logs.OUR_PACKAGES, *logs.LIBRARIES))]
    before = [(each, each.handlers[:], each.level, each.propagate) for each in loggers]

    def start(process="rank 3", **options):
        logs.configure(ObservabilityConfig(**options), process)
        return lambda: capsys.readouterr().err.splitlines()

    yield start
    for handler in root.handlers:
        handler.close()
    for each, handlers, level, propagate in before:
        each.handlers[:], each.propagate = handlers, propagate
        each.setLevel(level)


def test_json_lines_have_time_level_process_and_what_is_extra(configure):
    lines = configure(log_format="json")
    extra = {"request_id": "cmpl-1", "first_token_ms": 1.5}
    logging.getLogger("cluster.server.gateway").warning('100%% of "%s"\n次', "it", extra=extra)
    (line,) = map(json.loads, lines())
    time = datetime.fromisoformat(line.pop("time"))
    assert abs((datetime.now(UTC) - time).total_seconds()) < 60
    assert line == {
        "level": "warning",
        "logger": "cluster.server.gateway",
        "process": "rank 3",
        "message": '100% of "it"\n次',
        "request_id": "cmpl-1",
        "first_token_ms": 1.5,
    }


def test_an_exception_stays_one_json_line(configure):
    lines = configure(log_format="json")
    try:
        raise ValueError("why\nnot")
    except ValueError:
        logging.getLogger("cluster").exception("it failed")
    (line,) = map(json.loads, lines())
    assert line["message"] == "it failed"
    assert "Traceback" in line["error"]
    assert "ValueError: why\nnot" in line["error"]


def test_text_lines_name_process_and_request_once(configure):
    lines = configure("100% controller")
    log = logging.getLogger("cluster.server")
    log.info("slow", extra={"request_id": "cmpl-1"})
    log.info("request cmpl-2: done", extra={"request_id": "cmpl-2"})
    log.info("plain")
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    bodies = [re.sub(f"^{time} ", "", line) for line in lines()]
    assert bodies == [
        "INFO 100% controller: slow [cmpl-1]",
        "INFO 100% controller: request cmpl-2: done",
        "INFO 100% controller: plain",
    ]


@pytest.mark.parametrize(
    ("level", "ours", "theirs"),
    [("debug", 10, 20), ("info", 20, 20), ("warning", 30, 30), ("error", 40, 40)],
)
def test_levels_are_for_us_and_libraries_do_not_debug(configure, level, ours, theirs):
    lines = configure(log_level=level)
    for number in (10, 20, 30, 40):
        logging.getLogger("deploy.cluster").log(number, "ours %d", number)
        logging.getLogger("grpc._channel").log(number, "theirs %d", number)
    assert [line.split(": ", 1)[1] for line in lines()] == [
        f"{whose} {number}"
        for number in (10, 20, 30, 40)
        for whose, least in (("ours", ours), ("theirs", theirs))
        if number >= least
    ]


def test_uvicorn_and_grpc_write_as_we_do(configure):
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.addHandler(logging.StreamHandler())
    uvicorn.propagate = False
    lines = configure(log_format="json")
    uvicorn.warning("started")  # a server of another test may have silenced less
    logging.getLogger("uvicorn.access").info("GET /health")
    (line,) = map(json.loads, lines())
    assert (line["logger"], line["message"]) == ("uvicorn.error", "started")


def test_each_process_has_its_file_which_may_be_rotated(configure, tmp_path):
    lines = configure(log_format="json", log_dir=str(tmp_path / "logs"))
    file = tmp_path / "logs" / "rank-3.log"
    logging.getLogger("cluster").info("one")
    file.rename(tmp_path / "rotated")
    logging.getLogger("cluster").info("two")
    assert [json.loads(line)["message"] for line in lines()] == ["one", "two"]
    assert json.loads((tmp_path / "rotated").read_text())["message"] == "one"
    assert json.loads(file.read_text())["message"] == "two"


def test_a_directory_that_cannot_be_written_is_named(configure, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"observability\.log_dir = '.*/file/logs'"):
        configure(log_dir=str(tmp_path / "file" / "logs"))
