"""Streamed text equals the text of all tokens together, in whole characters.

The oracle is `tokenizers`: decode of the complete list of tokens.
"""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.engine.detokenizer import Detokenizer

CORPUS = [
    "the cat sat on the mat",
    "naïve café",
    "子曰學而時習之不亦說乎",
    "def f(x):\n    return x",
    "🙂👍🏽",
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """A byte-level BPE in which most characters of other scripts take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """SentencePiece-like: words carry their space, unknown characters fall back to byte tokens."""
    words = ["▁the", "▁cat", "s", "▁", "a", "é", "▁sat"]
    vocabulary = {token: idx for idx, token in enumerate(["<unk>", *words])}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@pytest.fixture(scope="module")
def mixed_bytes() -> Tokenizer:
    """Byte-level tokens, two of which begin another character: `x` E2, and AC E2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: idx for idx, token in enumerate([*alphabet, "xâ", "¬â"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("x", "â"), ("¬", "â")]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token per byte."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = [b for b in range(256) if b not in printable]
    chars = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [tokenizer.token_to_id(chars[byte]) for byte in data]


def stream(decoder: Tokenizer, token_ids: list[int], **options) -> list[str]:
    detokenizer = Detokenizer(decoder, **options)
    pieces = [detokenizer.add(token_id) for token_id in token_ids]
    return [*pieces, detokenizer.finish()]


texts = st.text(st.characters(codec="utf-8") | st.sampled_from("é子🙂👍🏽\ufffd a"), max_size=40)


@settings(deadline=None)
@given(text=texts, cuts=st.sets(st.integers(0, 160)))
def test_any_split_of_any_text_gives_the_text_back(bpe, text, cuts):
    """Each piece of the text's bytes is tokenized byte by byte or as the tokenizer would."""
    data = text.encode()
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    token_ids = []
    for idx, (start, end) in enumerate(itertools.pairwise(bounds)):
        piece = data[start:end]
        try:
            whole = bpe.encode(piece.decode()).ids if idx % 2 else None
        except UnicodeDecodeError:
            whole = None
        token_ids += byte_tokens(bpe, piece) if whole is None else whole
    pieces = stream(bpe, token_ids)
    assert "".join(pieces) == text
    shown = ""
    for num_tokens, piece in enumerate(pieces[:-1], 1):
        shown += piece
        assert text.startswith(shown)
        # No later than it must be: only an unfinished character (or a real U+FFFD) is missing.
        assert shown.rstrip("\ufffd") == bpe.decode(token_ids[:num_tokens]).rstrip("\ufffd")


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_tokens_give_what_decoding_them_together_gives(bpe, data):
    """Also tokens that are no text at all, as a model may well produce."""
    invalid = byte_tokens(bpe, bytes([0x80, 0xBF, 0xE2, 0x82, 0xF0, 0x9F, 0x98, 0xC3, 0xFF, 0xED]))
    some = st.integers(0, bpe.get_vocab_size() + 3) | st.sampled_from(invalid)
    token_ids = data.draw(st.lists(some, max_size=60))
    assert "".join(stream(bpe, token_ids)) == bpe.decode(token_ids)


@settings(deadline=None, max_examples=300)
@given(
    start=st.lists(st.sampled_from(["x", "Â", "â", "xâ"]), max_size=20),
    rest=st.lists(st.sampled_from(["Ĥ", "¬", "â", "¬â", "xâ", "ð", "Ł", "Ģ"]), max_size=40),
)
@example(start=[], rest=["â", *["Ĥ", "¬â"] * 30, "Ĥ", "¬"])  # thirty euros, none alone
def test_long_runs_that_end_inside_a_character(mixed_bytes, start, rest):
    """Runs so long that they are shown before they end, wherever characters begin and end."""
    known = mixed_bytes.get_vocab()
    token_ids = [known[token] for token in [*start, *rest] if token in known]
    assert "".join(stream(mixed_bytes, token_ids)) == mixed_bytes.decode(token_ids)


def test_endless_bytes_that_are_no_text_are_shown_and_cost_no_more_and_more(bpe):
    decoded = []

    class Counting:
        def decode(self, ids, skip_special_tokens=True):
            decoded.append(len(ids))
            return bpe.decode(ids, skip_special_tokens=skip_special_tokens)

    token_ids = byte_tokens(bpe, b"ok" + b"\x80" * 500 + "é!".encode())
    pieces = stream(Counting(), token_ids)
    assert "".join(pieces) == bpe.decode(token_ids)
    assert len("".join(pieces[:400])) > 350
    assert max(decoded) < 24
    assert len(decoded) < 4 * len(token_ids)


def test_special_tokens_are_hidden_or_shown(bpe):
    end = bpe.token_to_id("<|end|>")
    token_ids = [*bpe.encode("the").ids, end, *bpe.encode(" cat").ids]
    assert "".join(stream(bpe, token_ids)) == "the cat"
    assert "".join(stream(bpe, token_ids, skip_special_tokens=False)) == "the<|end|> cat"


@given(token_ids=st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 7]), min_size=1, max_size=20))
def test_word_markers_keep_their_spaces(metaspace, token_ids):
    assert "".join(stream(metaspace, token_ids)) == metaspace.decode(token_ids)


def test_completion_of_a_prompt_keeps_its_first_space(metaspace):
    the, cat, s, *_ = range(1, 8)
    assert stream(metaspace, [cat, s], prompt_token_ids=[the] * 9) == [" cat", "s", ""]


def test_byte_fallback_waits_for_the_whole_character(metaspace):
    euro = [metaspace.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    the = metaspace.token_to_id("▁the")
    assert stream(metaspace, [the, *euro, the]) == ["the", "", "", "€", " the", ""]


def test_a_character_begun_in_the_prompt_is_completed(bpe):
    token_ids = byte_tokens(bpe, "ab子c".encode())
    assert "".join(stream(bpe, token_ids[4:], prompt_token_ids=token_ids[:4])) == "子c"


@settings(deadline=None)
@given(text=st.text("ab子🙂", max_size=30), stop=st.lists(st.text("ab子", min_size=1, max_size=4)))
def test_stop_strings_across_tokens(bpe, text, stop):
    detokenizer = Detokenizer(bpe, stop=stop)
    shown = ""
    for token_id in byte_tokens(bpe, text.encode()):
        shown += detokenizer.add(token_id)
        if detokenizer.stop_string is not None:
            break
    shown += detokenizer.finish()
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert (shown, detokenizer.stop_string) == (text, None)
    else:
        assert detokenizer.stop_string in stop
        assert shown + detokenizer.stop_string == text[: min(ends)]
        assert detokenizer.add(byte_tokens(bpe, b"a")[0]) == ""


def test_finish_can_complete_a_stop_string(bpe):
    """The last bytes become text only at the end: they count as well."""
    detokenizer = Detokenizer(bpe, stop=["x\ufffd"])
    shown = [detokenizer.add(token_id) for token_id in byte_tokens(bpe, b"ax\xe2")]
    assert (shown, detokenizer.finish()) == (["a", "", ""], "")
    assert detokenizer.stop_string == "x\ufffd"
