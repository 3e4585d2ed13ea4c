"""Which server a command talks to, and as whom: the same options, and variables, for all commands."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cluster.server.client import Client

_PANEL = "Server"


def _option(text: str, name: str, metavar: str = "FILE") -> Any:
    return typer.Option(
        f"--{name}",
        help=text,
        metavar=metavar,
        envvar=f"EXPERTMESH_{name.upper().replace('-', '_')}",
        show_envvar=False,
        rich_help_panel=_PANEL,
    )


@dataclass(frozen=True)
class Server:
    """A server and how to reach it; option --x-y of a command, variable EXPERTMESH_X_Y."""

    endpoint: Annotated[str, _option("Where the cluster answers.", "endpoint", "HOST:PORT")] = (
        "127.0.0.1:50051"
    )
    token_file: Annotated[
        Path | None, _option("Token to show, where the server wants one.", "token-file")
    ] = None
    admin_token_file: Annotated[
        Path | None, _option("The server's admin token, if it has one.", "admin-token-file")
    ] = None
    ca_file: Annotated[
        Path | None, _option("Authority of the server's certificate: use TLS.", "ca-file")
    ] = None
    cert_file: Annotated[
        Path | None, _option("Our certificate, where the server wants one.", "cert-file")
    ] = None
    key_file: Annotated[Path | None, _option("Key of --cert-file.", "key-file")] = None

    def client(self, timeout_s: float | None = None) -> "Client":
        """Raises ClientError, which names the option, for a file that cannot be used."""
        from cluster.server.client import Client, ClientError
        from cluster.server.errors import Code
        from deploy.failed_calls import read_token

        try:
            token = read_token("--token-file", self.token_file)
            admin_token = read_token("--admin-token-file", self.admin_token_file)
        except ValueError as error:
            raise ClientError(Code.INVALID_ARGUMENT, str(error)) from None
        return Client(
            self.endpoint,
            timeout_s,
            token=token,
            admin_token=admin_token,
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
        )


def with_server(command: Callable[..., None]) -> Callable[..., None]:
    """Gives the command of a parameter `server` the options of Server in its place."""
    signature = inspect.signature(command)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "server"]
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=field.type,
        )
        for field in fields(Server)
    ]

    @functools.wraps(command)
    def asked(**given: Any) -> None:
        server = Server(**{option.name: given.pop(option.name) for option in options})
        command(server=server, **given)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + options
    asked.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    asked.__annotations__ = {p.name: p.annotation for p in parameters}
    return asked
