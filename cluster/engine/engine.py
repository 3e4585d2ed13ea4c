"""The step loop of one rank: leaders schedule and sample, followers compute what they are told.

    leader:    mail -> schedule -> agree -> broadcast -> execute -> sample -> send
    follower:                               receive   -> execute

The experts join all replicas, so every replica takes part in every step: leaders first agree, in
one small all-gather, on whether there is work (an idle replica runs with zero tokens), on the
placement epoch, and on stopping. A new placement, which all ranks have prepared, comes in force once
every leader was told so: in the same step on all ranks, before they execute. When nobody has work
everybody sleeps until a mailbox wakes or a heartbeat is due. A frame goes to the gateway at least once
per heartbeat, events or not: it judges a replica's health by its silence.
"""

import logging
from dataclasses import dataclass
from time import monotonic

import msgpack
import torch

from cluster.config import ServeConfig
from cluster.engine.mailbox import Frame, Mailbox
from cluster.engine.plan import StepPlan
from cluster.engine.runner import Runner, max_model_len
from cluster.engine.sampler import sample
from cluster.engine.scheduler import Scheduler, SchedulerConfig
from cluster.engine.sequence import SamplingParams, Sequence, TokenEvent
from comms.groups import ParallelGroups

HEARTBEAT_S = 1.0

logger = logging.getLogger(__name__)


class LockStepError(RuntimeError):
    """Replicas disagree on the placement epoch: they would send tokens to the wrong slots."""


@dataclass(frozen=True)
class Verdict:
    """What all leaders agreed to do in this step."""

    max_tokens: int
    """Of any replica in this step. 0: nobody has work."""
    epoch: int
    """Of the placement that is in force from this step on."""
    stop: bool

    @property
    def run(self) -> bool:
        return self.max_tokens > 0


class Leader:
    """Owns the sequences of one DP replica; runs on TP rank 0."""

    def __init__(
        self, groups: ParallelGroups, runner: Runner, scheduler: Scheduler, mailbox: Mailbox
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self._groups = groups
        self._mailbox = mailbox
        self._replica = groups.topology.replica_of(groups.rank)
        self._idle = False
        self._committed = runner.epoch
        self._stop_requested = False
        self._last_sent = 0.0

    def step(self) -> bool:
        """One step of all replicas together; False once all were told to stop."""
        events = self._read_mail()
        timer = self.runner.timer
        with timer.phase("schedule"):
            plan = self.scheduler.schedule()
        with timer.phase("broadcast"):
            verdict = self._agree(plan.num_tokens)
            header = [verdict.max_tokens, verdict.epoch, verdict.stop, plan.encode()]
            self._groups.tp.broadcast_bytes(msgpack.packb(header), 0)
        flips = verdict.epoch != self.runner.epoch
        self.runner.flip(verdict.epoch)
        if verdict.run:
            logits = self.runner.execute(plan, verdict.max_tokens)
            with timer.phase("sample"):
                events += self._sample(plan, logits)
        else:
            self.runner.rest()
        if events or flips or monotonic() - self._last_sent >= HEARTBEAT_S:
            self._mailbox.send(self._frame(events))
            self._last_sent = monotonic()
        self._idle = not verdict.run
        return not verdict.stop

    def _read_mail(self) -> list[TokenEvent]:
        """Take in requests; returns the events of those that could not even be queued."""
        events: list[TokenEvent] = []
        sleeps = self._idle and not self.scheduler.has_work and self._committed == self.runner.epoch
        wait_s = HEARTBEAT_S if sleeps else 0.0
        for frame in self._mailbox.receive(wait_s):
            match frame["type"]:
                case "add":
                    events += self._add(frame)
                case "abort":
                    self.scheduler.abort(str(frame.get("request_id")))
                case "placement":
                    self._commit(frame.get("epoch"))
                case "stop":
                    self._stop_requested = True
        return events

    def _add(self, frame: Frame) -> list[TokenEvent]:
        try:
            params = SamplingParams.from_dict(frame["sampling"])
            self.scheduler.add(Sequence(frame["request_id"], frame["token_ids"], params))
        except (KeyError, TypeError, ValueError) as error:
            request_id = str(frame.get("request_id"))
            return [TokenEvent(request_id, finish_reason="error", error=str(error))]
        return []

    def _commit(self, epoch: object) -> None:
        """All ranks are said to have prepared this epoch; it may be said more than once."""
        if not isinstance(epoch, int) or (
            epoch > self._committed and not self.runner.commit(epoch)
        ):
            logger.warning(
                "epoch %r is not prepared here: epoch %d stays in force", epoch, self.runner.epoch
            )
        else:
            self._committed = max(self._committed, epoch)

    def _agree(self, num_tokens: int) -> Verdict:
        """The lock-step vector: [tokens in my step, epoch in force, committed epoch, stop]."""
        leaders = self._groups.leaders
        assert leaders is not None, "only leaders agree"
        vote = [num_tokens, self.runner.epoch, self._committed, self._stop_requested]
        votes = leaders.all_gather(torch.tensor([vote]), [1] * leaders.size)
        epochs = votes[:, 1].unique().tolist()
        if len(epochs) > 1:
            raise LockStepError(f"replicas stand at different placement epochs: {epochs}")
        return Verdict(
            max_tokens=int(votes[:, 0].max()),
            epoch=int(votes[:, 2].min()),
            stop=bool(votes[:, 3].all()),
        )

    def _sample(self, plan: StepPlan, logits: torch.Tensor | None) -> list[TokenEvent]:
        assert logits is not None, "TP rank 0 holds the logits"
        sequences = [self.scheduler.sequence(item.seq_id) for item in plan.logit_items]
        token_ids = sample(logits, [s.params for s in sequences], [s.num_tokens for s in sequences])
        tokens = {s.seq_id: token_id for s, token_id in zip(sequences, token_ids, strict=True)}
        return self.scheduler.update(plan, tokens)

    def _frame(self, events: list[TokenEvent]) -> Frame:
        runner = self.runner
        stats = {**self.scheduler.stats(), "step": runner.num_steps, "epoch": runner.epoch}
        return {"type": "step", "replica": self._replica, "events": events, "stats": stats}


class Follower:
    """Executes its leader's plans; runs on every other TP rank."""

    def __init__(self, groups: ParallelGroups, runner: Runner) -> None:
        self.runner = runner
        self._groups = groups

    def step(self) -> bool:
        """One step as the leader broadcast it; False once told to stop."""
        with self.runner.timer.phase("broadcast"):
            header = self._groups.tp.broadcast_bytes(None, 0)
            max_tokens, epoch, stop, plan = msgpack.unpackb(header)
        self.runner.flip(epoch)
        if max_tokens:
            self.runner.execute(StepPlan.decode(plan), max_tokens)
        else:
            self.runner.rest()
        return not stop


def build_engine(
    config: ServeConfig, groups: ParallelGroups, mailbox: Mailbox | None
) -> Leader | Follower:
    """Load this rank's share of the model; leaders bring a mailbox, followers None."""
    runner = Runner.load(config, groups)
    if mailbox is None:
        return Follower(groups, runner)
    model = runner.model.config
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            block_size=config.cache.block_size,
            num_blocks=runner.cache.num_blocks,
            max_model_len=max_model_len(config, model),
            eos_token_ids=model.eos_token_ids,
            vocab_size=model.vocab_size,
        )
    )
    return Leader(groups, runner, scheduler, mailbox)
