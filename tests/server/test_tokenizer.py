"""A checkpoint's tokenizer is read as it is, or its file is named."""

import pytest

from cluster.server.tokenizer import TokenizerError, load_tokenizer
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
