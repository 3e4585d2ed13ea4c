"""Commands reach servers with TLS and tokens, by options or by variables."""

import pytest
from typer.testing import CliRunner

from cluster.server.client import ClientError
from deploy.cli import app
from deploy.server_options import Server
from tests.server.serving import serve
from tests.server.tls import Authority


@pytest.fixture
def guarded(tmp_path):
    """A server that wants a certificate of its clients, and a token; and our options for it."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    our_cert, our_key = authority.issue("us")
    token = tmp_path / "token"
    token.write_text("sesame\n")
    token.chmod(0o600)
    options = (
        f"server.tls_cert_file={cert}",
        f"server.tls_key_file={key}",
        f"server.tls_client_ca_file={authority.ca}",
        f"server.token_file={token}",
    )
    with serve(*options) as serving:
        yield {
            "endpoint": serving.address,
            "token-file": token,
            "ca-file": authority.ca,
            "cert-file": our_cert,
            "key-file": our_key,
        }


def invoke(options=(), variables=()):
    flags = [part for name, value in dict(options).items() for part in (f"--{name}", str(value))]
    environment = {
        f"EXPERTMESH_{name.upper().replace('-', '_')}": str(value)
        for name, value in dict(variables).items()
    }
    return CliRunner().invoke(app, ["generate", "the cat", "--seed", "1", *flags], env=environment)


def test_options_and_variables_do_the_same(guarded):
    by_options = invoke(guarded)
    assert by_options.exit_code == 0, by_options.output
    assert len(by_options.stdout) > 5
    assert invoke(variables=guarded).stdout == by_options.stdout


@pytest.mark.parametrize("left_out", ["token-file", "ca-file"])
def test_without_one_of_them_the_server_refuses(guarded, left_out):
    kept = {name: value for name, value in guarded.items() if name != left_out}
    refused = invoke(kept | {"endpoint": guarded["endpoint"]})
    assert refused.exit_code in (1, 2)
    assert "UNAUTHENTICATED" in refused.output or "UNAVAILABLE" in refused.output


@pytest.mark.parametrize("option", ["token_file", "admin_token_file", "ca_file"])
def test_files_that_are_not_there_are_named(option, tmp_path):
    with pytest.raises(ClientError, match=rf"{option.replace('_', '.')}.*cannot be read"):
        Server(**{option: tmp_path / "none"}).client()
