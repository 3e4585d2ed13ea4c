"""`expertmesh credentials`: a server and clients that trust each other and nobody else."""

import socket
import ssl
import stat
import threading

import pytest
import yaml
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store
from typer.testing import CliRunner

from cluster.config import ServeConfig
from cluster.server.security import Credentials
from deploy.cli import app
from tests.server.serving import serve

SECRET = {"ca.key", "server.key", "client.key", "token", "admin-token"}


def make(directory, *options):
    return CliRunner().invoke(app, ["credentials", str(directory), *options])


@pytest.fixture
def made(tmp_path):
    result = make(tmp_path / "made", "--hosts", "gateway.example, 192.0.2.7")
    assert result.exit_code == 0, result.output
    return tmp_path / "made", result.output


def test_secrets_are_readable_by_their_owner_only(made):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made[0].iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == SECRET
    assert set(modes) - SECRET == {"ca.pem", "server.pem", "client.pem"}
    assert stat.S_IMODE(made[0].stat().st_mode) == 0o700
    tokens = [(made[0] / name).read_text().strip() for name in ("token", "admin-token")]
    assert len(set(tokens)) == 2
    assert min(map(len, tokens)) >= 43, "less than 256 bits"


def test_the_printed_lines_are_a_configuration_that_may_listen_to_strangers(made):
    text = made[1].partition("In the server's configuration")[2].partition("\n")[2]
    lines = [line for line in text.partition("\n\n")[0].splitlines() if "#" not in line]
    server = yaml.safe_load("\n".join(lines))["server"]
    config = ServeConfig.from_dict({"model": "m", "server": {**server, "host": "0.0.0.0"}})
    assert Credentials.load(config.server).grpc


def handshake(directory, host, *, client=False):
    """Of OpenSSL's server and client; what either raises."""
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(directory / "server.pem", directory / "server.key")
    ours.load_verify_locations(directory / "ca.pem")
    ours.verify_mode = ssl.CERT_REQUIRED if client else ssl.CERT_NONE
    theirs = ssl.create_default_context(cafile=str(directory / "ca.pem"))
    if client:
        theirs.load_cert_chain(directory / "client.pem", directory / "client.key")
    left, right = socket.socketpair()
    with left, right:
        served = threading.Thread(target=lambda: ours.wrap_socket(left, server_side=True).close())
        served.start()
        try:
            theirs.wrap_socket(right, server_hostname=host).close()
        finally:
            served.join(10)


@pytest.mark.parametrize("host", ["gateway.example", "192.0.2.7", "localhost", "127.0.0.1", "::1"])
def test_the_certificate_is_for_these_hosts(made, host):
    handshake(made[0], host)
    handshake(made[0], host, client=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_and_for_no_other(made):
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made[0], "other.example")


def test_chains_satisfy_a_strict_verifier(made):
    """The rules of browsers and Go (CA/Browser Forum), as the `cryptography` library has them."""
    certs = {
        name: x509.load_pem_x509_certificate((made[0] / f"{name}.pem").read_bytes())
        for name in ("ca", "server", "client")
    }
    builder = PolicyBuilder().store(Store([certs["ca"]]))
    verifier = builder.build_server_verifier(x509.DNSName("gateway.example"))
    assert verifier.verify(certs["server"], [])[-1] == certs["ca"]
    with pytest.raises(x509.verification.VerificationError):
        verifier.verify(certs["client"], [])


def test_a_served_cluster_and_our_commands_use_them(made):
    directory = made[0]
    options = (
        f"server.tls_cert_file={directory}/server.pem",
        f"server.tls_key_file={directory}/server.key",
        f"server.tls_client_ca_file={directory}/ca.pem",
        f"server.token_file={directory}/token",
    )
    with serve(*options) as serving:
        variables = {
            "EXPERTMESH_ENDPOINT": serving.address,
            "EXPERTMESH_CA_FILE": f"{directory}/ca.pem",
            "EXPERTMESH_TOKEN_FILE": f"{directory}/token",
            "EXPERTMESH_CERT_FILE": f"{directory}/client.pem",
            "EXPERTMESH_KEY_FILE": f"{directory}/client.key",
        }
        answer = CliRunner().invoke(app, ["generate", "the cat"], env=variables)
        assert answer.exit_code == 0, answer.output


def test_nothing_is_overwritten(made):
    before = {path.name: path.read_bytes() for path in made[0].iterdir()}
    again = make(made[0])
    assert again.exit_code == 2
    assert "exists" in again.output
    assert {path.name: path.read_bytes() for path in made[0].iterdir()} == before


@pytest.mark.parametrize("host", ["a:50051", "https://a", "a b", "naïve"])
def test_hosts_that_cannot_be(host, tmp_path):
    result = make(tmp_path / "none", "--hosts", host)
    assert result.exit_code == 2
    assert "--hosts" in result.output
