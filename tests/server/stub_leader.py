"""A leader without a model: speaks the wire protocol for real and follows a simple token rule."""

import threading
import time
from collections import deque

import msgpack
import zmq

from cluster.engine.sequence import RoutedExperts, TokenEvent, TokenLogprob

HEARTBEAT_S = 0.05
QUEUE_MS = 1.5
BLOCK = 4
"""Tokens of a block of the cache that it pretends to have."""
NUM_LAYERS, NUM_CHOSEN = 2, 3


def next_token(token_ids, seed, vocab_size):
    """Depends on every token so far and on the seed, so a lost or swapped token changes the rest."""
    state = seed + 1
    for token_id in token_ids:
        state = (state * 1_000_003 + token_id + 7) % (1 << 61)
    return (state >> 7) % vocab_size


def completion(prompt_ids, seed, vocab_size, max_tokens, stop_ids=()):
    """What the leader says to a request that nobody interrupts."""
    token_ids = list(prompt_ids)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids, seed, vocab_size))
        if token_ids[-1] in stop_ids:
            break
    return token_ids[len(prompt_ids) :]


def logprob_of(token_id, num_top):
    """Told from the token alone, so that a test can see which token it came with."""
    top = tuple(range(num_top))
    return TokenLogprob(
        token_id, -token_id / 8, token_id + 1, top, tuple(-other / 8 for other in top)
    )


def routing_of(token_ids, start):
    """The same for experts: every id is the token's own, modulo 2^16."""
    data = b"".join((i % 65536).to_bytes(2, "little") * NUM_LAYERS * NUM_CHOSEN for i in token_ids)
    return RoutedExperts(start, NUM_LAYERS, NUM_CHOSEN, data)


class StubLeader(threading.Thread):
    """One thread, real sockets. `received` is every message that came, in order.

    `silent`: sends nothing at all. `held`: sends heartbeats but no tokens. `forgetful`: takes
    requests in and drops them. `fail_prompts_with`: first prompt token that means an engine error.
    `deaf_to_commits`: keeps the placement it has; otherwise a committed epoch is in force at once.
    `seen`: prompts by salt, whose whole blocks of tokens it says to have cached.
    """

    def __init__(self, replica, vocab_size, eos_token_ids=(), step_s=0.0):
        super().__init__(name=f"stub-leader-{replica}", daemon=True)
        self.received = []
        self.silent = threading.Event()
        self.held = threading.Event()
        self.forgetful = threading.Event()
        self.deaf_to_commits = threading.Event()
        self.fail_prompts_with = None
        self.raw_frames = deque()
        self.seen = set()
        self._replica = replica
        self._vocab_size = vocab_size
        self._eos = frozenset(eos_token_ids)
        self._step_s = step_s
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        port = self._inbox.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self._outbox = self._context.socket(zmq.PUSH)
        self._sequences = {}
        self._epoch = 0
        self._num_steps = 0
        self._stopping = threading.Event()

    def connect(self, gateway_address):
        self._outbox.connect(gateway_address)
        self.start()

    def of_type(self, kind):
        return [message for message in self.received if message["type"] == kind]

    def wait_for(self, kind, count=1, timeout_s=10.0):
        deadline = time.monotonic() + timeout_s
        while len(self.of_type(kind)) < count:
            assert time.monotonic() < deadline, f"no {count} {kind} messages: {self.received}"
            time.sleep(0.005)
        return self.of_type(kind)

    def close(self):
        self._stopping.set()
        if self.is_alive():
            self.join(10)
        self._inbox.close(linger=0)
        self._outbox.close(linger=0)
        self._context.term()

    def run(self):
        last_frame = 0.0
        while not self._stopping.is_set():
            busy = bool(self._sequences) and not self.held.is_set()
            if self._inbox.poll(round(1e3 * (self._step_s if busy else 0.01))):
                self._read()
            while self.raw_frames:
                self._outbox.send(self.raw_frames.popleft())
            events = [] if self.held.is_set() or self.silent.is_set() else self._step()
            due = time.monotonic() - last_frame > HEARTBEAT_S
            if (events or due) and not self.silent.is_set():
                last_frame = time.monotonic()
                self._outbox.send(msgpack.packb(self._frame(events)))

    def _read(self):
        while self._inbox.poll(0):
            message = msgpack.unpackb(self._inbox.recv())
            if message["type"] == "add" and not self.forgetful.is_set():
                self._sequences[message["request_id"]] = _Sequence(message)
            elif message["type"] == "abort":
                self._sequences.pop(message["request_id"], None)
            elif message["type"] == "placement" and not self.deaf_to_commits.is_set():
                self._epoch = message["epoch"]
            elif message["type"] == "flush_cache":
                self.seen.clear()
            self.received.append(message)

    def _step(self):
        events = []
        for request_id, sequence in list(self._sequences.items()):
            if sequence.token_ids[0] == self.fail_prompts_with:
                event = TokenEvent(request_id, finish_reason="error", error="logits are NaN")
            else:
                event = self._next(request_id, sequence)
            if event.finish_reason:
                del self._sequences[request_id]
            events.append(event)
        return events

    def _next(self, request_id, sequence):
        sampling, token_ids = sequence.sampling, sequence.token_ids
        first = len(token_ids) == sequence.num_prompt
        extras = self._of_prompt(sequence) if first else {}
        token_id = next_token(token_ids, sampling["seed"], self._vocab_size)
        token_ids.append(token_id)
        if (num_top := sampling.get("logprobs")) is not None:
            extras["logprob"] = logprob_of(token_id, num_top)
        if sequence.routed:
            start = 0 if first else len(token_ids) - 2
            extras["routed_experts"] = (routing_of(token_ids[start:-1], start),)
        stops = set(sampling["stop_token_ids"])
        stops |= set() if sampling["ignore_eos"] else self._eos
        stop_token_id = token_id if token_id in stops else None
        finish = "stop" if stop_token_id is not None else None
        if finish is None and len(token_ids) - sequence.num_prompt == sampling["max_tokens"]:
            finish = "length"
        return TokenEvent(request_id, token_id, finish, stop_token_id, **extras)

    def _of_prompt(self, sequence):
        """What comes with the first token only."""
        prompt = sequence.token_ids
        blocks = [(sequence.salt, *prompt[:end]) for end in range(BLOCK, len(prompt), BLOCK)]
        extras = {"cached_tokens": BLOCK * sum(block in self.seen for block in blocks)}
        self.seen.update(blocks)
        if (num_top := sequence.sampling.get("prompt_logprobs")) is not None:
            extras["prompt_logprobs"] = tuple(logprob_of(i, num_top) for i in prompt[1:])
        return extras | {"queue_ms": QUEUE_MS}

    def _frame(self, events):
        self._num_steps += bool(events)
        return {
            "type": "step",
            "replica": self._replica,
            "events": events,
            "stats": {
                "running": len(self._sequences),
                "waiting": 0,
                "kv_usage": 0.25,
                "preemptions": 0,
                "step": self._num_steps,
                "epoch": self._epoch,
                "kv_blocks_used": len(self._sequences),
                "kv_blocks_cached": len(self.seen),
                "kv_blocks_total": 100,
            },
        }


class _Sequence:
    def __init__(self, message):
        self.token_ids = list(message["token_ids"])
        self.num_prompt = len(self.token_ids)
        self.sampling = message["sampling"]
        self.salt = message["cache_salt"]
        self.routed = message["routed_experts"]
