"""A checkpoint's tokenizer is read as it is, or its file is named."""

import pytest
from tokenizers import Tokenizer, decoders, models

from cluster.server.tokenizer import TokenizerError, TokenTexts, load_tokenizer
from tests.server.serving import byte_level_tokenizer


def test_settings_of_training_do_not_cut_or_pad_prompts(tmp_path):
    tokenizer = byte_level_tokenizer()
    expected = tokenizer.encode("the cat sat on the mat").ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("the cat sat on the mat").ids == expected


def test_absent_is_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_broken_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path)


class TestTokenTexts:
    def test_bytes_join_to_the_text_although_tokens_cut_characters(self):
        tokenizer = byte_level_tokenizer()
        texts = TokenTexts(tokenizer)
        text = "".join(map(chr, range(0x180))) + " the cat é🦆请\n"
        ids = tokenizer.encode(text).ids
        assert b"".join(texts.raw(token_id) for token_id in ids) == text.encode()
        assert texts.text(tokenizer.encode("🦆").ids[0]) == "\ufffd"
        assert texts.text(tokenizer.token_to_id("Ġthe")) == " the"

    def test_bytes_that_have_tokens_of_their_own(self):
        tokenizer = Tokenizer(models.BPE({"a": 0, "<0xF0>": 1, "é": 2}, []))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        texts = TokenTexts(tokenizer)
        assert [texts.raw(token_id) for token_id in range(3)] == [b"a", b"\xf0", "é".encode()]

    def test_without_a_tokenizer(self):
        assert TokenTexts(None).text(7) == "token_id:7"
        assert TokenTexts(None).raw(7) == b"token_id:7"
