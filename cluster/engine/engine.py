"""The step loop of one rank: leaders schedule and sample, followers compute what they are told.

    leader:    mail -> schedule -> agree -> broadcast -> execute -> sample -> send
    follower:                               receive   -> execute

The experts join all replicas, so every replica takes part in every step: leaders first agree, in
one small all-gather, on whether there is work (an idle replica runs with zero tokens), on the
placement epoch, and on stopping. A new placement, which all ranks have prepared, comes in force once
every leader was told so: in the same step on all ranks, before they execute. When nobody has work
everybody sleeps until a mailbox wakes or a heartbeat is due. A frame goes to the gateway at least once
per heartbeat, events or not: it judges a replica's health by its silence.

With `scheduler.async_scheduling` a leader executes in a thread beside its own. While that computes one
step, the leader tells of the step before, reads mail and schedules the next; then it samples, and
completes the plan with the tokens. To the others it is the same step, so each leader is free to do so.
"""

import logging
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import msgpack
import torch
from torch import Tensor

from cluster.config import ServeConfig
from cluster.engine.arrivals import Arrivals
from cluster.engine.mailbox import Frame, Mailbox
from cluster.engine.outputs import take_outputs
from cluster.engine.plan import StepPlan
from cluster.engine.runner import Runner, max_model_len
from cluster.engine.sampler import Sampler
from cluster.engine.scheduler import Scheduler, SchedulerConfig
from cluster.engine.sequence import TokenEvent
from comms.groups import ParallelGroups

HEARTBEAT_S = 1.0
PREPARING_S = 0.005
"""Between two looks at whether a request is ready, when there is no other."""

logger = logging.getLogger(__name__)


class LockStepError(RuntimeError):
    """Replicas disagree on the placement epoch: they would send tokens to the wrong slots."""


@dataclass(frozen=True)
class Verdict:
    """What all leaders agreed to do in this step."""

    max_tokens: int
    """Of any replica in this step. 0: nobody has work."""
    max_blocks: int
    """Of any sequence in this step, of all replicas."""
    epoch: int
    """Of the placement that is in force from this step on."""
    stop: bool
    preparing: bool
    """Some leader has a request that may be ready any moment: nobody sleeps."""

    @property
    def run(self) -> bool:
        return self.max_tokens > 0


class Leader:
    """Owns the sequences of one DP replica; runs on TP rank 0.

    `executor`: one thread that computes while this one schedules; None: one after the other.
    `forgets_at_flip`: the KV cache of the old placement is not what the new one would compute.
    """

    def __init__(
        self,
        groups: ParallelGroups,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        mailbox: Mailbox,
        *,
        executor: Executor | None = None,
        forgets_at_flip: bool = False,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self._groups = groups
        self._sampler = sampler
        self._mailbox = mailbox
        self._executor = executor
        self._forgets_at_flip = forgets_at_flip
        self._arrivals = Arrivals(sampler)
        self._replica = groups.topology.replica_of(groups.rank)
        self._computing: tuple[StepPlan, Future[Tensor | None]] | None = None
        self._idle = False
        self._committed = runner.epoch
        self._stop_requested = False
        self._last_sent = 0.0
        self._step_tokens = 0
        self._step_ms = 0.0

    def step(self) -> bool:
        """One step of all replicas together; False once all were told to stop."""
        timer = self.runner.timer
        began = monotonic()
        with timer.phase("mail"):
            events = self._read_mail()
        with timer.phase("schedule"):
            if self._forgets_at_flip:  # this may be the step with which a new placement begins
                self.scheduler.finds_blocks = self._committed == self.runner.epoch
            plan = self.scheduler.schedule()
            self._arrivals.stamp()
        events += self._collect()
        with timer.phase("schedule"):
            plan = self.scheduler.complete(plan)
        with timer.phase("broadcast"):
            verdict = self._agree(plan)
            header = [verdict.max_tokens, verdict.max_blocks, verdict.epoch, verdict.stop]
            self._groups.tp.broadcast_bytes(msgpack.packb([*header, plan.encode()]), 0)
        flips = verdict.epoch != self.runner.epoch
        if flips and self._forgets_at_flip:
            self.scheduler.forget_cache()
        self.runner.flip(verdict.epoch)
        if verdict.run:
            self._compute(plan, verdict)
        else:
            self.runner.rest()
        if self._executor is None or verdict.stop:
            events += self._collect()
        if self._executor is not None and verdict.stop:
            self._executor.shutdown()
        self._step_tokens = plan.num_tokens
        if events or flips or monotonic() - self._last_sent >= HEARTBEAT_S:
            with timer.phase("mail"):
                self._mailbox.send(self._frame(events))
            self._last_sent = monotonic()
        self._idle = not verdict.run and (self._arrivals.preparing or not verdict.preparing)
        self._step_ms = 1000 * (monotonic() - began)
        return not verdict.stop

    def _compute(self, plan: StepPlan, verdict: Verdict) -> None:
        step = plan, verdict.max_tokens, verdict.max_blocks
        if self._executor is not None:
            self._computing = plan, self._executor.submit(self.runner.execute, *step)
            return
        done: Future[Tensor | None] = Future()
        done.set_result(self.runner.execute(*step))
        self._computing = plan, done

    def _collect(self) -> list[TokenEvent]:
        """The tokens of the step that is being computed, if there is one."""
        if self._computing is None:
            return []
        plan, done = self._computing
        self._computing = None
        logits = done.result()
        assert logits is not None, "TP rank 0 holds the logits"
        with self.runner.timer.phase("sample"):
            routed = self.runner.routed_TLK
            return take_outputs(plan, self.scheduler, self._sampler, logits, routed)

    def _read_mail(self) -> list[TokenEvent]:
        """Take in requests; returns the events of those that could not even be queued."""
        events = self._arrivals.pass_on(self.scheduler)
        for frame in self._mailbox.receive(self._patience()):
            match frame["type"]:
                case "add":
                    events += self._arrivals.add(frame, self.scheduler)
                case "abort":
                    request_id = str(frame.get("request_id"))
                    if not self._arrivals.abort(request_id):
                        self.scheduler.abort(request_id)
                case "flush_cache":
                    self.scheduler.forget_cache()
                case "placement":
                    self._commit(frame.get("epoch"))
                case "stop":
                    self._stop_requested = True
        return events

    def _patience(self) -> float:
        """Seconds to wait for mail when there is nothing else to do."""
        if not self._idle or self.scheduler.has_work or self._committed != self.runner.epoch:
            return 0.0
        return PREPARING_S if self._arrivals.preparing else HEARTBEAT_S

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

    def _agree(self, plan: StepPlan) -> Verdict:
        """The lock-step vector: [tokens and longest block table of my step, epoch in force, committed epoch,
        stop, preparing]."""
        leaders = self._groups.leaders
        assert leaders is not None, "only leaders agree"
        preparing = self._arrivals.preparing
        epochs = [self.runner.epoch, self._committed]
        vote = [plan.num_tokens, plan.max_blocks, *epochs, self._stop_requested, preparing]
        votes = leaders.all_gather(torch.tensor([vote]), [1] * leaders.size)
        epochs = votes[:, 2].unique().tolist()
        if len(epochs) > 1:
            raise LockStepError(f"replicas stand at different placement epochs: {epochs}")
        return Verdict(
            max_tokens=int(votes[:, 0].max()),
            max_blocks=int(votes[:, 1].max()),
            epoch=int(votes[:, 3].min()),
            stop=bool(votes[:, 4].all()),
            preparing=bool(votes[:, 5].any()),
        )

    def _frame(self, events: list[TokenEvent]) -> Frame:
        runner = self.runner
        stats = {
            **self.scheduler.stats(),
            "step": runner.num_steps,
            "epoch": runner.epoch,
            "step_tokens": self._step_tokens,
            "step_ms": self._step_ms,
            "phases": runner.timer.seconds.copy(),
        }
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
            max_tokens, max_blocks, epoch, stop, plan = msgpack.unpackb(header)
        self.runner.flip(epoch)
        if max_tokens:
            self.runner.execute(StepPlan.decode(plan), max_tokens, max_blocks)
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
            enable_prefix_caching=config.cache.enable_prefix_caching,
        )
    )
    sampler = Sampler(model.vocab_size, model.eos_token_ids, Path(config.model))
    executor = None
    if config.scheduler.async_scheduling:
        executor = ThreadPoolExecutor(1, "execute")
    return Leader(
        groups,
        runner,
        scheduler,
        sampler,
        mailbox,
        executor=executor,
        forgets_at_flip=config.comms.combine == "node",
    )
