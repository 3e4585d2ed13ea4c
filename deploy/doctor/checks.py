"""What each check says of a situation. One function each, of what was found alone, in the order shown.

A problem would keep the cluster from starting or make it wrong; a warning is worth knowing before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from cluster.config import ConfigError
from cluster.model.config import ModelConfig
from cluster.model.errors import CheckpointError, UnsupportedModelError
from cluster.server.security import Credentials, is_loopback
from deploy.doctor.layout import cpus_per_node, nodes_by_host, rank_bytes
from deploy.doctor.situation import Finding, Host, Situation, ok, problem, warning

RAY_STOP_WAIT_S = 3.0
"""How long `ray job stop` lets a job finish before it kills it, unless told otherwise."""
STOP_MARGIN_S = 15.0
"""That ending the ranks may take after the last request (`deploy.cluster`)."""
MAX_CLOCK_OFFSET_S = 0.1
MIN_OPEN_FILES = 4096
_GIB = 1 << 30


def hosts(situation: Situation) -> Finding:
    if situation.silent:
        named = "; ".join(f"{address}: {why}" for address, why in situation.silent.items())
        return problem(
            "hosts",
            f"no answer from {named}",
            "look at Ray's logs there (/tmp/ray/session_latest/logs), or remove the host",
        )
    if not situation.driver_is_on_head:
        return warning(
            "hosts",
            "this is not the Ray head, where `ray job submit` runs the driver: ports, tokens and "
            "certificates were looked at on another host than the job will use",
            "run doctor on the head, or with `ray job submit -- expertmesh doctor ...`",
        )
    return ok("hosts", f"{_hosts(len(situation.hosts))} answered: {_addresses(situation.hosts)}")


def placement(situation: Situation) -> Finding:
    config = situation.config
    need, parallel = cpus_per_node(config), config.parallel
    strategy = config.ray.placement_strategy
    layout = f"{parallel.num_nodes} nodes of {need:g} CPUs, {strategy}"
    if placed := nodes_by_host(config, situation.hosts):
        where = ", ".join(f"{number} on {address}" for address, number in placed.items())
        return ok("placement", f"{layout}: {where}")
    free = ", ".join(f"{host.address} {host.free_cpus:g}" for host in situation.hosts)
    return problem(
        "placement",
        f"no room for {layout}; free CPUs: {free}",
        "add hosts, stop other jobs, lower ray.cpus_per_rank, or choose a smaller layout"
        + (" (STRICT_SPREAD wants a host for each node)" if strategy == "STRICT_SPREAD" else ""),
    )


def versions(situation: Situation) -> Finding:
    names = list(situation.hosts[0].versions)
    of_name = {n: {h.address: h.versions[n] for h in situation.hosts} for n in names}
    different = [name for name in names if len(set(of_name[name].values())) > 1]
    if different:
        told = "; ".join(f"{name}: {_by_value(of_name[name])}" for name in different)
        return problem(
            "versions", told, "install the same versions (constraints.txt) on every host"
        )
    shown = ", ".join(f"{name} {of_name[name][situation.hosts[0].address]}" for name in names)
    sources = {host.address: host.sources or "not importable" for host in situation.hosts}
    if len(set(sources.values())) > 1 or "" in {host.sources for host in situation.hosts}:
        return problem(
            "versions",
            f"expertmesh differs: {_by_value(sources)}",
            "install the same release on every host, or submit the job with --working-dir",
        )
    return ok("versions", f"{shown}, sources {situation.hosts[0].sources} everywhere")


def model(situation: Situation) -> Finding:
    directory = situation.config.model
    unread = {h.address: h.model["error"] for h in situation.hosts if "error" in h.model}
    if unread:
        return problem(
            "model",
            f"{directory}: " + "; ".join(f"{host}: {why}" for host, why in unread.items()),
            "mount or copy the checkpoint to the same path on every host",
        )
    for name in sorted({name for host in situation.hosts for name in host.model}):
        found = {host.address: host.model.get(name, "missing") for host in situation.hosts}
        if len(set(found.values())) > 1:
            return problem(
                "model",
                f"{directory}/{name} differs: {_by_value(found)}",
                "copy one checkpoint to every host",
            )
    try:
        shape = ModelConfig.from_dir(directory)
    except (CheckpointError, UnsupportedModelError) as error:
        return problem("model", str(error), "choose a checkpoint that can be served")
    return ok("model", f"{situation.config.model_name}: {shape.architecture}, the same everywhere")


def memory(situation: Situation) -> Finding:
    config = situation.config
    try:
        of_rank = rank_bytes(config)
    except (CheckpointError, UnsupportedModelError, ValueError) as error:
        return problem("memory", f"this layout cannot be: {error}", "change parallel or experts")
    placed = nodes_by_host(config, situation.hosts) or {}
    short = {}
    for host in situation.hosts:
        need = placed.get(host.address, 0) * config.parallel.ranks_per_node * of_rank
        if need > host.memory_free:
            short[host.address] = f"{_gib(need)} needed, {_gib(host.memory_free)} free"
    if short:
        return problem(
            "memory",
            f"{_gib(of_rank)} a rank; " + "; ".join(f"{a}: {why}" for a, why in short.items()),
            "more hosts or nodes, a smaller cache.memory_gib, or fewer redundant experts",
        )
    return ok("memory", f"{_gib(of_rank)} a rank, {config.parallel.world_size} ranks: room for all")


def links(situation: Situation) -> Finding:
    broken = [link for link in situation.links if link.error]
    if broken:
        told = "; ".join(f"{k.source} to {k.target}: {k.error}" for k in broken[:4])
        more = f" and {len(broken) - 4} more" if len(broken) > 4 else ""
        return problem(
            "links",
            told + more,
            "let all hosts reach each other over TCP at all ports above 1023 "
            "(firewall, security group, --node-ip-address of `ray start`)",
        )
    if not situation.links:
        return ok("links", "one host: nothing crosses a network")
    slowest = max(situation.links, key=lambda link: link.seconds)
    return ok(
        "links",
        f"{len(situation.links)} of {len(situation.links)} connections between hosts answered, "
        f"the slowest in {1e3 * slowest.seconds:.1f} ms ({slowest.source} to {slowest.target})",
    )


def clocks(situation: Situation) -> Finding:
    def surely(host: Host) -> float:
        return max(0.0, abs(host.clock_offset_s) - host.clock_error_s)

    off = [host for host in situation.hosts if surely(host) > MAX_CLOCK_OFFSET_S]
    if off:
        told = ", ".join(f"{host.address} by {host.clock_offset_s:+.2f} s" for host in off)
        return warning(
            "clocks",
            f"differ from the head's: {told}; logs and traces of hosts will not line up",
            "run chrony or another NTP client on every host",
        )
    worst = max(abs(h.clock_offset_s) + h.clock_error_s for h in situation.hosts)
    return ok("clocks", f"within {1e3 * worst:.0f} ms of the head's")


def ports(situation: Situation) -> Finding:
    server = situation.config.server
    if situation.port_errors:
        told = "; ".join(f"{option}: {why}" for option, why in situation.port_errors.items())
        return problem(
            "ports",
            f"the head cannot listen: {told}",
            "end what listens there, or choose another server.port, http_port or host",
        )
    shown = [f"gRPC {server.port or 'any'}"]
    if server.http_port is not None:
        shown.append(f"HTTP {server.http_port or 'any'}")
    return ok("ports", f"free on {server.host}: {', '.join(shown)}")


def credentials(situation: Situation) -> Finding:
    server = situation.config.server
    try:
        read = Credentials.load(server)
    except ConfigError as error:
        return problem("credentials", str(error), "`expertmesh credentials DIR` makes such files")
    tls = "TLS" if read.tls_files else "no TLS"
    tokens = f"{len(read.tokens)} tokens" if read.tokens else "no token"
    if read.tls_files and read.tls_files.client_ca:
        tls = "TLS with certificates of clients"
    where = "for this host only" if is_loopback(server.host) else f"on {server.host}"
    return ok("credentials", f"{tls}, {tokens}, {where}")


def ray_auth(situation: Situation) -> Finding:
    open_hosts = [host for host in situation.hosts if not host.ray_auth]
    if not open_hosts:
        return ok("ray auth", "only those with its token may use this Ray")
    fix = "RAY_AUTH_MODE=token with `ray get-auth-token --generate`, on every host and client"
    told = "whoever reaches this Ray can run code on its hosts: it asks for no token"
    if all(is_loopback(host.address) for host in situation.hosts):
        return warning("ray auth", told, fix)
    return problem("ray auth", told, fix)


def stopping(situation: Situation) -> Finding:
    head = situation.head
    text = head.stop_wait_s if head else ""
    wait_s = float(text) if text.isdecimal() else RAY_STOP_WAIT_S
    drain_s = situation.config.server.drain_timeout_s
    if wait_s < drain_s + STOP_MARGIN_S:
        return warning(
            "stopping",
            f"`ray job stop` kills after {wait_s:g} s, while requests in flight may take "
            f"server.drain_timeout_s = {drain_s:g} s",
            f"start the Ray head with RAY_JOB_STOP_WAIT_TIME_S={drain_s + STOP_MARGIN_S:.0f}",
        )
    return ok("stopping", f"`ray job stop` waits {wait_s:g} s for requests in flight")


def shared_memory(situation: Situation) -> Finding:
    broken = {h.address: h.memfd_error for h in situation.hosts if h.memfd_error}
    if broken and situation.config.comms.node_backend == "shm":
        return problem(
            "shared memory",
            "; ".join(f"{host}: {why}" for host, why in broken.items()),
            "allow memfd_create and /proc/PID/fd (seccomp, hidepid), or comms.node_backend=gloo",
        )
    return ok("shared memory", "ranks of a host can share memory")


def limits(situation: Situation) -> Finding:
    need = max(MIN_OPEN_FILES, 2 * situation.config.server.max_concurrent_rpcs)
    low = {h.address: str(h.open_files) for h in situation.hosts if 0 <= h.open_files < need}
    if low:
        return warning(
            "limits",
            f"few open files allowed: {_by_value(low)}; {need} are wanted for streams and links",
            "`ulimit -n 65536` before `ray start`, or LimitNOFILE= of its service",
        )
    return ok("limits", f"at least {need} open files on every host")


def processors(situation: Situation) -> Finding:
    kinds = {host.address: host.cpu for host in situation.hosts}
    if len(set(kinds.values())) > 1:
        return warning(
            "processors",
            f"differ: {_by_value(kinds)}; replicas may add in another order, and the same request "
            "may get other tokens on another host",
            "use hosts of one kind where answers must be the same",
        )
    crowded = {
        h.address: f"Ray counts {h.ray_cpus:g}, processes may use {h.num_cpus}"
        for h in situation.hosts
        if h.ray_cpus > h.num_cpus
    }
    if crowded:
        return warning(
            "processors",
            "; ".join(f"{host}: {why}" for host, why in crowded.items()),
            "`ray start --num-cpus` of what is there, or ranks will wait for each other",
        )
    return ok("processors", f"{situation.hosts[0].cpu} everywhere")


def gpus(situation: Situation) -> Finding:
    hidden = {
        h.address: f"{h.gpu_devices} there, torch sees {h.gpus_visible}, Ray {h.ray_gpus:g}"
        for h in situation.hosts
        if not h.gpu_devices == h.gpus_visible == h.ray_gpus
    }
    if hidden:
        return warning(
            "gpus",
            "; ".join(f"{host}: {why}" for host, why in hidden.items()),
            "a CUDA build of torch, and --gpus all (docker) or resources.limits (Kubernetes)",
        )
    number = sum(host.gpu_devices for host in situation.hosts)
    return ok("gpus", f"{number} GPUs, all visible" if number else "none; ranks compute on CPUs")


CHECKS: tuple[Callable[[Situation], Finding], ...] = (
    hosts, placement, versions, model, memory, links, clocks, ports, credentials, ray_auth,
    stopping, shared_memory, limits, processors, gpus,
)  # fmt: skip


def examine(situation: Situation) -> list[Finding]:
    """All findings, or only the first when nobody answered."""
    if not situation.hosts:
        return [hosts(situation)]
    return [check(situation) for check in CHECKS]


def _by_value(values: Mapping[str, str]) -> str:
    """ "2.60.0 on 10.0.0.1 and 2 more, 2.59.0 on 10.0.0.4"."""
    grouped: dict[str, list[str]] = defaultdict(list)
    for host, value in values.items():
        grouped[value].append(host)
    largest_first = sorted(grouped.items(), key=lambda item: -len(item[1]))
    return ", ".join(
        f"{value} on {hosts[0]}" + (f" and {len(hosts) - 1} more" if len(hosts) > 1 else "")
        for value, hosts in largest_first
    )


def _hosts(number: int) -> str:
    return "one host" if number == 1 else f"all {number} hosts"


def _addresses(found: Iterable[Host]) -> str:
    shown = [f"{host.address}{' (head)' * host.is_head}" for host in found]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _gib(number: float) -> str:
    return f"{number / _GIB:.1f} GiB"
