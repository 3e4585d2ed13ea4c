"""Log probabilities as OpenAI's completions and chats show them, and vLLM's of the prompt."""

from collections.abc import Sequence
from typing import Any

from cluster.engine.sequence import TokenLogprob
from cluster.server.tokenizer import TokenTexts

Json = dict[str, Any]


class CompletionLogprobs:
    """Of consecutive tokens of one completion; offsets count characters from its beginning."""

    def __init__(self, texts: TokenTexts, offset: int = 0) -> None:
        self._texts = texts
        self._offset = offset

    def body(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> Json:
        """None for tokens that have none: the first of a prompt."""
        shown: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, found in zip(token_ids, logprobs, strict=True):
            text = self._texts.text(token_id)
            shown["tokens"].append(text)
            shown["token_logprobs"].append(found.logprob if found else None)
            shown["top_logprobs"].append(self._top(found) if found else None)
            shown["text_offset"].append(self._offset)
            self._offset += len(text)
        return shown

    def _top(self, found: TokenLogprob) -> Json:
        """By text, as OpenAI has it; of tokens with the same text the likeliest."""
        top: Json = {}
        for token_id, logprob in zip(found.top_ids, found.top_logprobs, strict=True):
            top.setdefault(self._texts.text(token_id), logprob)
        return top


def chat_logprobs(texts: TokenTexts, logprobs: Sequence[TokenLogprob]) -> Json:
    def entry(token_id: int, logprob: float) -> Json:
        raw = texts.raw(token_id)
        return {"token": texts.text(token_id), "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            entry(found.token_id, found.logprob)
            | {
                "top_logprobs": [
                    entry(*top) for top in zip(found.top_ids, found.top_logprobs, strict=True)
                ]
            }
            for found in logprobs
        ],
        "refusal": None,
    }


def prompt_logprobs(texts: TokenTexts, logprobs: Sequence[TokenLogprob]) -> list[Json | None]:
    """By token id; the first token has none."""

    def entry(token_id: int, logprob: float, rank: int) -> Json:
        return {"logprob": logprob, "rank": rank, "decoded_token": texts.text(token_id)}

    shown: list[Json | None] = [None]
    for found in logprobs:
        tops = zip(found.top_ids, found.top_logprobs, strict=True)
        entries = {
            str(token_id): entry(token_id, logprob, rank)
            for rank, (token_id, logprob) in enumerate(tops, 1)
        }
        entries[str(found.token_id)] = entry(found.token_id, found.logprob, found.rank)
        shown.append(entries)
    return shown
