"""What the probe says of a host, on this one."""

import os
import socket
import threading
from pathlib import Path

import pytest

from deploy.doctor import probe
from deploy.doctor.probe import HostProbe
from deploy.settings import BUNDLED_MODELS


def test_facts_of_this_host() -> None:
    facts = HostProbe().facts(str(BUNDLED_MODELS["mosaic"]))
    assert facts["versions"]["torch"] != "missing"
    assert len(facts["sources"]) == 12
    assert facts["num_cpus"] == len(os.sched_getaffinity(0))
    assert facts["memfd_error"] == ""
    size = (BUNDLED_MODELS["mosaic"] / "model.safetensors").stat().st_size
    assert facts["model"]["model.safetensors"] == f"{size} bytes"


def test_a_model_that_cannot_be_read(tmp_path: Path) -> None:
    gone = HostProbe().facts(str(tmp_path / "gone"))["model"]
    assert gone["error"].startswith("No such file or directory")
    assert HostProbe().facts(str(tmp_path))["model"]["error"] == "there is no config.json"


def test_sources_differ_with_one_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(probe, "SOURCES", ("package",))
    before = probe._sources()
    (package / "__init__.py").write_text("#")
    assert probe._sources() != before
    monkeypatch.setattr(probe, "SOURCES", ("nonesuch",))
    assert probe._sources() == ""


def test_a_port_that_is_taken_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert HostProbe().bind_error("127.0.0.1", taken.getsockname()[1])
    assert HostProbe().bind_error("127.0.0.1", 0) == ""


def test_knocking_tells_who_answers_from_who_does_not() -> None:
    host = HostProbe()
    listening = host.listen("127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refused = closed.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        answering = threading.Thread(target=answer, args=(stranger, b"HTTP/1.1 400"))
        answering.start()
        ports = (listening, refused, stranger.getsockname()[1])
        errors = [error for _, error in host.knock([("127.0.0.1", port) for port in ports])]
        answering.join()
    assert errors[0] == ""
    assert errors[1] == "Connection refused"
    assert "something else answered" in errors[2]


def answer(listener: socket.socket, text: bytes) -> None:
    peer, _ = listener.accept()
    with peer:
        peer.sendall(text)
