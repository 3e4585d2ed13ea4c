"""`expertmesh demo`: the whole cluster on this machine, for a minute.

Two logical nodes of two ranks serve the bundled model; a real client streams completions over
gRPC; then the demo shows how fast it was, which rank's experts worked how much, and how many
bytes moved inside and between nodes. It leaves nothing behind.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cluster.server.client import AsyncClient
from deploy.cluster import RunningCluster, running_cluster
from deploy.exit_code import exit_code_of
from deploy.json_file import write_json
from deploy.local_ray import local_ray
from deploy.models.prompts import DEMO_PROMPTS, DemoPrompt
from deploy.serve import cpus_for
from deploy.settings import load_config

MAX_TOKENS = 96
# A model this small repeats itself when decoded greedily; the seed makes every demo the same.
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "seed": 1}


@dataclass
class Completion:
    """One streamed answer, as far as it has come."""

    prompt: DemoPrompt
    text: str = ""
    token_ids: list[int] = field(default_factory=list)

    def panel(self) -> Panel:
        text = Text(self.prompt.text, style="bold").append(self.text, style="not bold")
        return Panel(text, title=self.prompt.domain, title_align="left")


def demo_command(json_file: Path | None) -> int:
    """Run the demo; 0 when all completions arrived, 130 on Ctrl-C."""
    return exit_code_of(lambda: write_json(json_file, _demo(Console())), interrupted=130)


def _demo(console: Console) -> dict[str, Any]:
    config = load_config(None, [])
    parallel = config.parallel
    layout = f"{parallel.num_nodes} logical nodes x {parallel.ranks_per_node} ranks"
    started = time.monotonic()
    console.print("starting a private Ray ...")
    with local_ray(cpus_for(config)):
        console.print(f"starting {layout} and loading {config.model_name} ...")
        with running_cluster(config) as cluster:
            console.print(
                f"ready after {time.monotonic() - started:.0f} s, gRPC on {cluster.endpoint}"
            )
            report = _generate_and_measure(console, cluster)
    console.print("stopped; nothing is left running")
    return report


def _generate_and_measure(console: Console, cluster: RunningCluster) -> dict[str, Any]:
    start = time.monotonic()
    completions = asyncio.run(_stream_all(console, cluster.endpoint))
    seconds = time.monotonic() - start
    stats = cluster.stats()
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    report = {
        "prompts": [
            {
                "domain": completion.prompt.domain,
                "prompt": completion.prompt.text,
                "text": completion.text,
                "tokens": completion.token_ids,
            }
            for completion in completions
        ],
        "tokens_per_s": num_tokens / seconds,
        "expert_load": [rank["expert_load"] for rank in stats],
        "bytes": {
            kind: sum(rank["bytes"][kind] for rank in stats)
            for kind in ("intra_node", "inter_node")
        },
    }
    _print_summary(console, report, num_tokens, seconds)
    return report


async def _stream_all(console: Console, endpoint: str) -> list[Completion]:
    """All prompts at once; live in a terminal, as a plain list elsewhere."""
    completions = [Completion(prompt) for prompt in DEMO_PROMPTS]
    view = Live(console=console, refresh_per_second=8, transient=True)
    if console.is_terminal:
        view.start()
    try:
        async with AsyncClient(endpoint) as client:
            await asyncio.gather(*(_stream(client, c, completions, view) for c in completions))
    finally:
        view.stop()
    console.print(_panels(completions))
    return completions


async def _stream(
    client: AsyncClient, completion: Completion, everything: Sequence[Completion], view: Live
) -> None:
    stream = client.generate_stream(completion.prompt.text, max_tokens=MAX_TOKENS, **SAMPLING)
    async for chunk in stream:
        completion.text += chunk.text
        completion.token_ids += chunk.token_ids
        view.update(_panels(everything))


def _panels(completions: Sequence[Completion]) -> Group:
    return Group(*(completion.panel() for completion in completions))


def _print_summary(
    console: Console, report: dict[str, Any], num_tokens: int, seconds: float
) -> None:
    table = Table("rank", "expert load (tokens, all layers)", "share")
    loads = [sum(layers) for layers in report["expert_load"]]
    total = max(1, sum(loads))
    for rank, load in enumerate(loads):
        table.add_row(
            str(rank), f"{load:,}", f"{load / total:.0%} {'#' * round(40 * load / total)}"
        )
    console.print(table)
    sent = report["bytes"]
    console.print(
        f"{num_tokens} tokens in {seconds:.1f} s: {report['tokens_per_s']:.1f} tokens/s\n"
        f"moved inside nodes {sent['intra_node'] / 1e6:.1f} MB, "
        f"between nodes {sent['inter_node'] / 1e6:.1f} MB"
    )
