"""From what a client asked to what an engine gets: checked, rendered, tokenized, defaults filled in."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import NamedTuple

from tokenizers import Tokenizer

from cluster.config import ServeConfig
from cluster.engine.sampling_params import Constraint, SamplingParams
from cluster.server.chat.template import ChatTemplate
from cluster.server.prompt import Prompt, PromptReader
from cluster.server.request import GenerationRequest, ModelInfo
from cluster.server.validation import check_prompt_length, check_request, read_sampling

CheckConstraint = Callable[[Constraint], Awaitable[None]]
"""Raises RequestError for a constraint that no engine can keep."""


class Draft(NamedTuple):
    """Sampling parameters as far as they are known before the prompt is."""

    params: SamplingParams
    bad_words: tuple[str, ...]


class Intake:
    """`check` at once, `read` when there is time: both raise RequestError."""

    def __init__(
        self,
        config: ServeConfig,
        model: ModelInfo,
        tokenizer: Tokenizer | None,
        chat: ChatTemplate | None,
        check_constraint: CheckConstraint | None,
    ) -> None:
        self.prompts = PromptReader(model, tokenizer, chat)
        self._config = config
        self._model = model
        self._check_constraint = check_constraint
        self._seeds = random.Random(config.seed)

    def check(self, request: GenerationRequest) -> Draft:
        """Everything that can be judged without tokenizing the prompt."""
        config = self._config
        check_request(request, self._model, config.server, config.parallel.num_replicas)
        return Draft(*read_sampling(request.sampling, self._model, config.server))

    async def read(self, request: GenerationRequest, draft: Draft) -> tuple[Prompt, SamplingParams]:
        """Its prompt in tokens, and all sampling parameters; may take long."""
        assert request.prompt is not None, "refused by check"
        prompt = await self.prompts.read(request.prompt)
        check_prompt_length(len(prompt.token_ids), self._model)
        sampling = {**prompt.sampling, **request.sampling}
        if prompt.sampling:
            draft = Draft(*read_sampling(sampling, self._model, self._config.server))
        params = draft.params
        default = self._config.server.default_max_tokens
        max_tokens = params.max_tokens if "max_tokens" in sampling else default
        params = replace(
            params,
            seed=params.seed if "seed" in sampling else self._seeds.getrandbits(63),
            max_tokens=min(max_tokens, self._model.max_model_len - len(prompt.token_ids)),
            bad_words=self.prompts.bad_words(draft.bad_words),
        )
        if params.constraint is not None and self._check_constraint is not None:
            await self._check_constraint(params.constraint)
        return prompt, params
