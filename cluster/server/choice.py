"""One completion of a request: its tokens and text so far, and what its reader has not seen."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from cluster.engine.detokenizer import Detokenizer
from cluster.engine.sampling_params import SamplingParams
from cluster.engine.sequence import RoutedExperts, TokenEvent, TokenLogprob
from cluster.server.request import Chunk, Finish, FinishReason


class Choice:
    """Fed with the engine's events until it finishes; `take` gives what is new.

    `token_ids` keeps every token since the beginning: with the prompt, parameters and seed it is
    all that another replica would need to go on with the same tokens.
    """

    def __init__(
        self,
        index: int,
        engine_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.index = index
        self.engine_id = engine_id
        """The engine knows each choice as a request of its own."""
        self.params = params
        self.token_ids: list[int] = []
        self.last_token_at: float | None = None
        self.finish: Finish | None = None
        self.queued = False
        """Whether it stands in the list of choices that have news."""
        self._detokenizer = (
            Detokenizer(
                tokenizer,
                stop=params.stop,
                prompt_token_ids=prompt_ids,
                skip_special_tokens=params.skip_special_tokens,
                include_stop_string=params.include_stop_string,
                min_tokens=params.min_tokens,
            )
            if tokenizer
            else None
        )
        self._text: list[str] = []
        self._num_taken = 0
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._routed_experts: list[RoutedExperts] = []
        self._has_details = False
        """Whether one of the last three lists has anything, as it is for few requests."""

    def accept(self, event: TokenEvent) -> Finish | None:
        """Take in one event of the engine; returns how the choice is to finish, if it is.

        A stop string that completes here finishes the choice although the engine goes on. Raises
        ValueError for a finish reason that there is not.
        """
        finish = None
        token_id = event.token_id
        if token_id is not None:
            self.token_ids.append(token_id)
            if token_id != event.stop_token_id and self._detokenizer is not None:
                self._show(self._detokenizer.add(token_id))
                finish = self._stop_string_finish()
        if event.logprob or event.prompt_logprobs or event.routed_experts:
            self._add_details(event)
        if finish is None and event.finish_reason is not None:
            finish = self._finish_of(event)
        return finish

    def end(self, finish: Finish) -> None:
        """Nothing more comes; what was held back is shown."""
        if self._detokenizer is not None:
            self._show(self._detokenizer.finish())
            # Text held back until now can still complete a stop string.
            finish = self._stop_string_finish() or finish
        self.finish = finish

    def take(self) -> Chunk:
        """Everything since the last call; with `finish` once the choice has ended."""
        token_ids = tuple(self.token_ids[self._num_taken :])
        self._num_taken = len(self.token_ids)
        text, self._text = "".join(self._text), []
        if not self._has_details:
            return Chunk(index=self.index, text=text, token_ids=token_ids, finish=self.finish)
        chunk = Chunk(
            index=self.index,
            text=text,
            token_ids=token_ids,
            finish=self.finish,
            logprobs=tuple(self._logprobs),
            prompt_logprobs=tuple(self._prompt_logprobs),
            routed_experts=tuple(self._routed_experts),
        )
        self._logprobs, self._prompt_logprobs, self._routed_experts = [], [], []
        self._has_details = False
        return chunk

    def _add_details(self, event: TokenEvent) -> None:
        self._has_details = True
        if event.logprob is not None:
            self._logprobs.append(event.logprob)
        self._prompt_logprobs += event.prompt_logprobs
        self._routed_experts += event.routed_experts

    def _show(self, text: str) -> None:
        if text:
            self._text.append(text)

    def _stop_string_finish(self) -> Finish | None:
        if self._detokenizer is None or self._detokenizer.stop_string is None:
            return None
        return Finish(reason=FinishReason.STOP, stop_string=self._detokenizer.stop_string)

    def _finish_of(self, event: TokenEvent) -> Finish:
        reason = FinishReason(event.finish_reason or "")
        if event.stop_token_id is None:
            return Finish(reason=reason)
        if event.stop_token_id in self.params.stop_token_ids:
            return Finish(reason=reason, stop_token_id=event.stop_token_id)
        return Finish(reason=reason, eos_token_id=event.stop_token_id)
