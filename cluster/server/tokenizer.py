"""Reads the tokenizer of a checkpoint directory."""

from pathlib import Path

from tokenizers import Tokenizer


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used; the message names it."""


def load_tokenizer(model_dir: str | Path) -> Tokenizer | None:
    """`tokenizer.json`, or None where there is none: then clients send and get token ids only."""
    path = Path(model_dir) / "tokenizer.json"
    if not path.exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the Rust side raises plain Exception
        raise TokenizerError(f"{path}: cannot be read as a tokenizer: {error}") from None
    # A file may carry the settings of its training; prompts are neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
