"""A leader without a model: speaks the wire protocol for real and follows a simple token rule."""

import threading
import time
from collections import deque

import msgpack
import zmq

HEARTBEAT_S = 0.05


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


class StubLeader(threading.Thread):
    """One thread, real sockets. `received` is every message that came, in order.

    `silent`: sends nothing at all. `held`: sends heartbeats but no tokens. `forgetful`: takes
    requests in and drops them. `fail_prompts_with`: first prompt token that means an engine error.
    `deaf_to_commits`: keeps the placement it has; otherwise a committed epoch is in force at once.
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
                self._sequences[message["request_id"]] = (
                    list(message["token_ids"]),
                    message["sampling"],
                    len(message["token_ids"]),
                )
            elif message["type"] == "abort":
                self._sequences.pop(message["request_id"], None)
            elif message["type"] == "placement" and not self.deaf_to_commits.is_set():
                self._epoch = message["epoch"]
            self.received.append(message)

    def _step(self):
        events = []
        for request_id, (token_ids, sampling, num_prompt) in list(self._sequences.items()):
            if token_ids[0] == self.fail_prompts_with:
                events.append([request_id, None, "error", None, "logits are NaN"])
                del self._sequences[request_id]
                continue
            token_id = next_token(token_ids, sampling["seed"], self._vocab_size)
            token_ids.append(token_id)
            stops = set(sampling["stop_token_ids"])
            stops |= set() if sampling["ignore_eos"] else self._eos
            stop_token_id = token_id if token_id in stops else None
            finish = "stop" if stop_token_id is not None else None
            if finish is None and len(token_ids) - num_prompt == sampling["max_tokens"]:
                finish = "length"
            if finish:
                del self._sequences[request_id]
            events.append([request_id, token_id, finish, stop_token_id, None])
        return events

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
            },
        }
