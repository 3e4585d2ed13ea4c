"""Constraints on completions: which tokens may come next, by xgrammar.

A constraint is compiled once, beside the step loop, and then followed by every sequence that asks for
it. Where a sequence stands is a function of its tokens, so it can be made again from them. Once the
constraint is met and nothing can follow, only an end-of-sequence token may come.

V vocabulary.
"""

import json
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from time import thread_time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cluster.engine.constraint import Constraint
from cluster.engine.json_schema import enforceable

MAX_TOKEN_S: Final = 0.1
"""Processor time for one token; a constraint that takes longer holds up everybody."""
_TOKENIZER: Final = "tokenizer.json"
_CACHE_BYTES: Final = 64 << 20
_MAX_WHITESPACE: Final = 16
"""Between the parts of JSON; models have been seen to write it for ever."""


def check_support(tokenizer_dir: Path | None, eos_token_ids: Collection[int]) -> None:
    """Raise ValueError when there can be no constraints, for this model or without the extra."""
    if find_spec("xgrammar") is None:
        raise ValueError("a constraint needs the extra guided: pip install 'expertmesh[guided]'")
    if tokenizer_dir is None or not (tokenizer_dir / _TOKENIZER).is_file():
        raise ValueError(f"a constraint needs the model's {_TOKENIZER}: {tokenizer_dir} has none")
    if not eos_token_ids:
        raise ValueError("a constraint needs a model with an end-of-sequence token: it has none")


class GuideCompiler:
    """For one tokenizer; raises ValueError when it can have no constraints. From any thread."""

    def __init__(
        self, tokenizer_dir: Path | None, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        check_support(tokenizer_dir, eos_token_ids)
        import xgrammar

        assert tokenizer_dir is not None, "refused by check_support"
        self._xgrammar: Any = xgrammar
        vocabulary = _vocabulary(xgrammar, tokenizer_dir / _TOKENIZER, vocab_size)
        info = self._xgrammar.TokenizerInfo(**vocabulary, stop_token_ids=sorted(eos_token_ids))
        self._compiler = self._xgrammar.GrammarCompiler(
            info, max_threads=1, cache_limit_bytes=_CACHE_BYTES
        )
        self._vocab_size = vocab_size

    def compile(self, constraint: Constraint) -> Any:
        """What `Guide` follows; ValueError with the reason when it is no constraint we can keep."""
        try:
            match constraint.kind:
                case "json_schema":
                    schema = enforceable(constraint.text)
                    return self._compiler.compile_json_schema(
                        schema, max_whitespace_cnt=_MAX_WHITESPACE
                    )
                case "regex":
                    return self._compiler.compile_regex(constraint.text)
                case "grammar":
                    return self._compiler.compile_grammar(constraint.text)
                case "choices":
                    return self._compiler.compile_grammar(_alternatives(constraint.choices()))
        except RuntimeError as error:
            reason = str(error).strip().rpartition(".cc:")[2].partition(": ")[2] or str(error)
            raise ValueError(f"constraint.{constraint.kind} is not valid: {reason:.300}") from None

    def guide(self, compiled: Any) -> "Guide":
        return Guide(self._xgrammar, compiled, self._vocab_size)


class Guide:
    """Where one completion stands in its constraint."""

    def __init__(self, xgrammar: Any, compiled: Any, vocab_size: int) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bits = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._vocab_size = vocab_size
        self._num_seen = 0
        self._lost = False

    def apply(self, logits_V: NDArray[np.float32], completion: Sequence[int]) -> None:
        """Exclude what may not follow these tokens: everything, if they do not follow it themselves."""
        np.putmask(logits_V, ~self.allowed(completion), -np.inf)

    def allowed(self, completion: Sequence[int]) -> NDArray[np.bool_]:
        """[V]: what may follow. Nothing any more once a token took longer than MAX_TOKEN_S."""
        for token_id in completion[self._num_seen :]:
            self._lost = self._lost or not self._accept(token_id)
        self._num_seen = len(completion)
        if self._lost or self._matcher.is_terminated():
            return np.zeros(self._vocab_size, np.bool_)
        began = thread_time()
        self._matcher.fill_next_token_bitmask(self._bits)
        self._lost = thread_time() - began > MAX_TOKEN_S
        octets = self._bits.numpy().view(np.uint8)[0]
        allowed: NDArray[np.bool_] = np.unpackbits(
            octets, count=self._vocab_size, bitorder="little"
        ).view(np.bool_)
        return allowed

    @property
    def is_finished(self) -> bool:
        """Whether an end-of-sequence token was accepted."""
        return bool(self._matcher.is_terminated())

    def _accept(self, token_id: int) -> bool:
        began = thread_time()
        follows = not self._matcher.is_terminated() and self._matcher.accept_token(token_id)
        return follows and thread_time() - began <= MAX_TOKEN_S


def _alternatives(texts: Sequence[str]) -> str:
    """A grammar of these texts and no other."""
    return "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def _vocabulary(xgrammar: Any, path: Path, vocab_size: int) -> dict[str, Any]:
    """What xgrammar wants to know of tokenizer.json. Special tokens are no text: they get none."""
    text = path.read_text()
    tokenizer = Tokenizer.from_str(text)
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    pieces = [""] * vocab_size
    for piece, token_id in tokenizer.get_vocab().items():
        if token_id < vocab_size and token_id not in special:
            pieces[token_id] = piece
    kind = xgrammar.TokenizerInfo._detect_metadata_from_hf(text)
    return {
        "encoded_vocab": pieces,
        "vocab_type": kind["vocab_type"],
        "vocab_size": vocab_size,
        "add_prefix_space": kind["add_prefix_space"],
    }
