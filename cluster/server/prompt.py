"""From what a client sent as a prompt to the token ids that the engine gets."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from cluster.server.chat.template import ChatTemplate, no_template
from cluster.server.errors import Code, RequestError
from cluster.server.request import Chat, ModelInfo

_QUICK_CHARS = 512
"""Texts up to this length are tokenized at once: a thread would take longer than they do."""


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    text: str | None = None
    """Of a chat: what the template made of it."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Defaults for parameters that the request leaves open."""


class PromptReader:
    """Tokenizer and template of one model; either may be missing."""

    def __init__(
        self, model: ModelInfo, tokenizer: Tokenizer | None, template: ChatTemplate | None
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = template

    @property
    def presets(self) -> list[str]:
        """Names of the tasks that chats may name."""
        return sorted(self._template.presets) if self._template else []

    async def read(self, prompt: str | Sequence[int] | Chat) -> Prompt:
        """Raises RequestError where the model cannot take this kind of prompt."""
        if isinstance(prompt, str):
            return Prompt(await self.tokenize(prompt))
        if isinstance(prompt, Chat):
            text, sampling = await self._render(prompt)
            # The template has written the special tokens itself.
            return Prompt(await self.tokenize(text, add_special_tokens=False), text, sampling)
        return Prompt(list(prompt))

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        tokenizer = self._need_tokenizer("send token_ids instead of text")
        if len(text) <= _QUICK_CHARS:
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        # In a thread: a long text must not stop everybody else's stream.
        encoding = await asyncio.to_thread(
            tokenizer.encode, text, add_special_tokens=add_special_tokens
        )
        return list(encoding.ids)

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each word at the beginning of a text and inside one, after a space."""
        if not words:
            return ()
        tokenizer = self._need_tokenizer("bad_words cannot be used")
        spelt = [text for word in words for text in (word.lstrip(), f" {word.lstrip()}")]
        encodings = tokenizer.encode_batch(spelt, add_special_tokens=False)
        return tuple(dict.fromkeys(tuple(encoding.ids) for encoding in encodings if encoding.ids))

    async def _render(self, chat: Chat) -> tuple[str, Mapping[str, Any]]:
        if self._template is None:
            raise no_template(self._model.name)
        return await asyncio.to_thread(self._template.render, chat)

    def _need_tokenizer(self, instead: str) -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError(
                Code.FAILED_PRECONDITION, f"model {self._model.name!r} has no tokenizer: {instead}"
            )
        return self._tokenizer
