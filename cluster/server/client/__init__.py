"""Clients of a running server, blocking and asyncio, with errors that say what to do.

    with Client("127.0.0.1:50051") as client:
        client.wait_ready(60)
        print(client.generate("Once upon a time", max_tokens=50).text)
        for chunk in client.generate_stream("def fib(n):", temperature=0.0, stop=["\\n\\n"]):
            print(chunk.text, end="")
        chat = [{"role": "user", "content": "What is 6 x 7?"}]
        print(client.generate(chat, preset="math-tutor", n=2, logprobs=0).logprobs)

Prompts are text, token ids, or messages of a chat. Every failure is a ClientError with a `code`.
`AsyncClient` has the same methods, to be awaited.
"""

from cluster.server.client.asynchronous import AsyncClient
from cluster.server.client.blocking import Client
from cluster.server.client.connection import DEFAULT_TIMEOUT_S
from cluster.server.client.error import ClientError
from cluster.server.client.requests import build_request

__all__ = ["DEFAULT_TIMEOUT_S", "AsyncClient", "Client", "ClientError", "build_request"]
