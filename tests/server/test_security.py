"""Tokens and TLS: what is let in, what is refused, and configurations that would let in too much."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from cluster.config import ConfigError, ServerConfig
from cluster.server.errors import RequestError
from cluster.server.proto.expertmesh.v1 import control_pb2, control_pb2_grpc
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.server.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from cluster.server.security import Credentials, is_loopback
from tests.server.serving import serve
from tests.server.tls import Authority

ASK = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling=pb.SamplingParams(max_tokens=2))
REFUSED = grpc.StatusCode.UNAUTHENTICATED


def secret(path, text):
    path.write_text(text)
    path.chmod(0o600)
    return path


def bearer(token):
    return [("authorization", f"Bearer {token}")]


def code_of(call):
    """The status code that `call` ends with."""
    try:
        answer = call()
        if not hasattr(answer, "ByteSize"):
            list(answer)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.fixture
def tokens(tmp_path):
    users = secret(tmp_path / "tokens", "alice-1\nbob-2\n")
    admins = secret(tmp_path / "admin", "root-3\n")
    return f"server.token_file={users}", f"server.admin_token_file={admins}"


def test_every_call_of_every_service_needs_a_token(tokens):
    with serve(*tokens) as serving, grpc.insecure_channel(serving.address) as channel:
        inference, control = pb_grpc.InferenceStub(channel), control_pb2_grpc.ControlStub(channel)
        calls = {
            "Generate": lambda m: inference.Generate(ASK, metadata=m),
            "GenerateStream": lambda m: inference.GenerateStream(ASK, metadata=m),
            "Tokenize": lambda m: inference.Tokenize(pb.TokenizeRequest(text="a"), metadata=m),
            "GetLoads": lambda m: control.GetLoads(control_pb2.GetLoadsRequest(), metadata=m),
        }
        wrong = ([], bearer("alice-2"), bearer(""), bearer("alice-1 bob-2"),
                 [("authorization", "alice-1")], [("authorization", "Basic alice-1")])  # fmt: skip
        for call in calls.values():
            for metadata in wrong:
                assert code_of(lambda c=call, m=metadata: c(m)) == REFUSED, metadata
            for token in ("alice-1", "bob-2", "root-3"):
                assert code_of(lambda c=call, t=token: c(bearer(t))) == grpc.StatusCode.OK
        abort = control_pb2.AbortRequest(request_id="none")
        assert code_of(lambda: control.Abort(abort, metadata=bearer("alice-1"))) == REFUSED
        assert not control.Abort(abort, metadata=bearer("root-3")).aborted


def test_all_methods_of_our_services_are_behind_the_token(tokens):
    """Whatever is added to the .proto files later, too."""
    services = [
        *pb.DESCRIPTOR.services_by_name.values(),
        *control_pb2.DESCRIPTOR.services_by_name.values(),
    ]
    with serve(*tokens) as serving, grpc.insecure_channel(serving.address) as channel:
        for service in services:
            for method in service.methods:
                call = channel.unary_stream(f"/{service.full_name}/{method.name}")
                assert code_of(lambda c=call: c(b"", timeout=10)) == REFUSED, method.name


def test_health_and_reflection_need_no_token(tokens):
    with serve(*tokens) as serving, grpc.insecure_channel(serving.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="expertmesh.v1.Inference")
        assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        assert (
            "expertmesh.v1.Inference" in ProtoReflectionDescriptorDatabase(channel).get_services()
        )


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def channel_to(serving, authority, client=None):
    cert, key = client or (None, None)
    return grpc.secure_channel(
        serving.address,
        grpc.ssl_channel_credentials(
            authority.ca.read_bytes(),
            key and key.read_bytes(),
            cert and cert.read_bytes(),
        ),
    )


def tls_options(authority):
    cert, key = authority.issue("server")
    return f"server.tls_cert_file={cert}", f"server.tls_key_file={key}"


def test_tls(authority, tmp_path):
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other", "other CA")
    with serve(*tls_options(authority)) as serving:
        with channel_to(serving, authority) as channel:
            assert len(pb_grpc.InferenceStub(channel).Generate(ASK).token_ids) == 2
        for channel in (grpc.insecure_channel(serving.address), channel_to(serving, stranger)):
            with channel:
                call = pb_grpc.InferenceStub(channel).Generate
                assert code_of(lambda c=call: c(ASK)) == grpc.StatusCode.UNAVAILABLE


def test_mutual_tls_lets_in_clients_of_its_authority_only(authority, tmp_path):
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other", "other CA").issue("mallory")
    options = (*tls_options(authority), f"server.tls_client_ca_file={authority.ca}")
    with serve(*options) as serving:
        with channel_to(serving, authority, authority.issue("alice")) as channel:
            assert len(pb_grpc.InferenceStub(channel).Generate(ASK).token_ids) == 2
        for client in (None, stranger):
            with channel_to(serving, authority, client) as channel:
                call = pb_grpc.InferenceStub(channel).Generate
                assert code_of(lambda c=call: c(ASK)) == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "gateway.example"])
def test_strangers_are_not_listened_to_without_tls_and_token(host, authority, tmp_path):
    cert, key = map(str, authority.issue("server"))
    tls = {"tls_cert_file": cert, "tls_key_file": key}
    token = {"token_file": str(secret(tmp_path / "token", "x" * 32))}
    admin = {"admin_token_file": token["token_file"]}
    for given, missing in (
        (tls, "token_file"),
        (tls | admin, "token_file"),
        (token, "tls_cert_file"),
    ):
        with pytest.raises(ConfigError, match=rf"{host}.*{missing}"):
            Credentials.load(ServerConfig(host=host, **given))
    assert Credentials.load(ServerConfig(host=host, **tls, **token)).grpc


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback_needs_neither(host):
    assert is_loopback(host)
    assert Credentials.load(ServerConfig(host=host)).grpc is None


def test_what_files_cannot_be_is_said_by_name(authority, tmp_path):
    cert, key = map(str, authority.issue("server"))
    other = str(authority.issue("other")[1])
    open_key = tmp_path / "open.key"
    open_key.write_bytes(authority.issue("open")[1].read_bytes())
    open_key.chmod(0o644)
    empty, text = secret(tmp_path / "empty", "\n \n"), secret(tmp_path / "text", "no certificate")
    cases = [
        ({"token_file": "/nonexistent"}, r"token_file = '/nonexistent': cannot be read: No such"),
        ({"token_file": str(tmp_path)}, r"cannot be read: Is a directory"),
        ({"token_file": str(empty)}, r"token_file.*holds no token"),
        ({"admin_token_file": str(text)}, r"admin_token_file.*token 1 must be printable ASCII"),
        ({"admin_token_file": str(open_key)}, r"every user of this host has access: `chmod"),
        ({"tls_cert_file": cert}, r"both"),
        ({"tls_key_file": key}, r"both"),
        ({"tls_client_ca_file": cert}, r"both"),
        ({"tls_cert_file": cert, "tls_key_file": str(open_key)}, r"tls_key_file.*chmod"),
        ({"tls_cert_file": cert, "tls_key_file": other}, r"no PEM certificate with its"),
        ({"tls_cert_file": str(text), "tls_key_file": key}, r"no PEM certificate with its"),
        ({"tls_cert_file": cert, "tls_key_file": key, "tls_client_ca_file": str(text)},
         r"tls_client_ca_file.*no PEM"),
    ]  # fmt: skip
    for given, message in cases:
        with pytest.raises(ConfigError, match=message):
            Credentials.load(ServerConfig(**given))


def test_admin_calls_without_a_token_are_for_loopback():
    credentials = Credentials.load(ServerConfig())
    credentials.check_admin(None, peer_is_loopback=True)
    with pytest.raises(RequestError, match=r"PERMISSION_DENIED.*admin_token_file"):
        credentials.check_admin(b"Bearer x", peer_is_loopback=False)


def test_oversized_metadata_and_messages_are_refused_and_the_next_call_is_served():
    options = ("server.max_metadata_kib=16", "server.max_message_mib=1")
    with serve(*options) as serving, grpc.insecure_channel(serving.address) as channel:
        call = pb_grpc.InferenceStub(channel).Generate
        huge = [("x-header", "x" * 64_000)]
        assert code_of(lambda: call(ASK, metadata=huge)) == grpc.StatusCode.RESOURCE_EXHAUSTED
        large = pb.GenerateRequest(text="x" * (2 << 20))
        assert code_of(lambda: call(large)) == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(call(ASK).token_ids) == 2


@pytest.mark.parametrize("method", ["Inference/Generate", "Inference/GenerateStream"])
def test_bytes_that_are_no_message_are_the_clients_fault(method, caplog):
    with serve() as serving, grpc.insecure_channel(serving.address) as channel:
        call = channel.unary_stream(f"/expertmesh.v1.{method}")
        with pytest.raises(grpc.RpcError, match="cannot be read") as caught:
            list(call(b"\xff\xff", timeout=10))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert len(pb_grpc.InferenceStub(channel).Generate(ASK).token_ids) == 2
    assert not caplog.records


def test_a_drain_that_cannot_be_read_drains_nothing():
    with serve() as serving, grpc.insecure_channel(serving.address) as channel:
        call = channel.unary_unary("/expertmesh.v1.Control/Drain")
        assert code_of(lambda: call(b"\xff", timeout=10)) == grpc.StatusCode.INVALID_ARGUMENT
        assert not serving.gateway.draining
