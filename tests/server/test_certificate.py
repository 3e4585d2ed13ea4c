"""A certificate that is replaced on disk is what new connections get, and old ones go on."""

import logging
import shutil
import socket
import ssl
from urllib.parse import urlsplit

import grpc
import pytest

from cluster.config import ConfigError
from cluster.server.certificate import CertificateOnDisk, TlsFiles
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.server.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from tests.server.serving import serve
from tests.server.tls import Authority

ASK = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling=pb.SamplingParams(max_tokens=2))
LONG = pb.GenerateRequest(
    token_ids=pb.TokenIds(ids=[1]), sampling=pb.SamplingParams(max_tokens=40, ignore_eos=True)
)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def options(files, *more):
    cert, key = files
    return "server.http_port=0", f"server.tls_cert_file={cert}", f"server.tls_key_file={key}", *more


def ports(serving):
    return int(serving.address.rpartition(":")[2]), urlsplit(serving.url).port


def shown(port, authority, client=None):
    """The certificate that a new connection to this port is shown, having let us in."""
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.set_alpn_protocols(["h2", "http/1.1"])
    if client:
        context.load_cert_chain(*client)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as link,
    ):
        # TLS 1.3 judges a client's certificate after the client's own handshake has ended.
        link.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        if not link.recv(1):
            raise ConnectionError("refused")
        return link.getpeercert(binary_form=True)


def on_disk(files):
    return ssl.PEM_cert_to_DER_cert(files[0].read_text())


def test_new_connections_get_it_and_old_ones_go_on(authority):
    files = authority.issue("server")
    first = on_disk(files)
    trust = grpc.ssl_channel_credentials(authority.ca.read_bytes())
    with (
        serve(*options(files), step_s=0.02) as serving,
        grpc.secure_channel(serving.address, trust) as channel,
    ):
        inference = pb_grpc.InferenceStub(channel)
        stream = inference.GenerateStream(LONG)
        assert next(stream)
        assert [shown(port, authority) for port in ports(serving)] == [first] * 2
        authority.issue("server")
        second = on_disk(files)
        assert second != first
        for _ in range(2):
            assert [shown(port, authority) for port in ports(serving)] == [second] * 2
        assert sum(len(chunk.token_ids) for chunk in stream) == 40
        assert len(inference.Generate(ASK).token_ids) == 2


def test_a_half_that_does_not_fit_changes_nothing_yet(authority, tmp_path, caplog):
    files = authority.issue("server")
    first = on_disk(files)
    fresh = authority.issue("fresh")
    caplog.set_level(logging.INFO, "cluster.server.certificate")
    with serve(*options(files)) as serving:
        shutil.copy(fresh[0], files[0])
        for _ in range(3):
            assert [shown(port, authority) for port in ports(serving)] == [first] * 2
        warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == 2  # one of each port, not of each connection
        assert "stays in use: server.tls_cert_file" in warnings[0].message
        files[1].unlink()
        assert [shown(port, authority) for port in ports(serving)] == [first] * 2
        shutil.copy(fresh[1], files[1])
        assert [shown(port, authority) for port in ports(serving)] == [on_disk(fresh)] * 2


def test_authorities_of_clients_are_replaced_too(authority, tmp_path):
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other", "other CA")
    alice, bob = authority.issue("alice"), other.issue("bob")
    clients = tmp_path / "clients.pem"
    shutil.copy(authority.ca, clients)
    files = authority.issue("server")
    with serve(*options(files, f"server.tls_client_ca_file={clients}")) as serving:
        for let_in, refused in ((alice, bob), (bob, alice)):
            for port in ports(serving):
                assert shown(port, authority, let_in) == on_disk(files)
                for client in (refused, None):
                    with pytest.raises((ssl.SSLError, ConnectionError)):
                        shown(port, authority, client)
            shutil.copy(other.ca, clients)


def test_files_that_stay_are_read_once(authority):
    files = authority.issue("server")
    certificate = CertificateOnDisk(TlsFiles(*map(str, files), None))
    assert certificate.current() is certificate.current()


def test_there_must_be_one_to_begin_with(authority, tmp_path):
    cert, _ = authority.issue("server")
    with pytest.raises(ConfigError, match=r"tls_key_file = .*cannot be read: No such file"):
        CertificateOnDisk(TlsFiles(str(cert), str(tmp_path / "none"), None))
