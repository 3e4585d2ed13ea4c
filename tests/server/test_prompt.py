"""Prompts in tokens: as the tokenizer alone would have them, special tokens where they belong."""

import asyncio

import pytest
from tokenizers.processors import TemplateProcessing

from cluster.config import ChatConfig
from cluster.server.chat.template import ChatTemplate
from cluster.server.errors import RequestError
from cluster.server.prompt import PromptReader
from cluster.server.request import Chat, ChatMessage, ModelInfo
from tests.server.serving import VOCAB_SIZE, byte_level_tokenizer

MODEL = ModelInfo(name="m", vocab_size=VOCAB_SIZE, max_model_len=100)
CHAT = Chat(messages=(ChatMessage(role="user", content="the cat"),))


@pytest.fixture(scope="module")
def tokenizer():
    """One that begins every text with a special token."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


@pytest.fixture
def reader(tokenizer):
    template = ChatTemplate.load("/no/checkpoint", ChatConfig(template="plain"))
    yield PromptReader(MODEL, tokenizer, template)
    template.close()


@pytest.mark.parametrize("text", ["the cat", "the cat " * 500])
def test_a_text_begins_with_the_special_token(reader, tokenizer, text):
    token_ids = asyncio.run(reader.read(text)).token_ids
    assert token_ids[0] == tokenizer.token_to_id("<s>")
    assert token_ids == tokenizer.encode(text).ids
    without = asyncio.run(reader.tokenize(text, add_special_tokens=False))
    assert without == token_ids[1:]


def test_a_chat_has_the_special_tokens_that_its_template_writes(reader, tokenizer):
    prompt = asyncio.run(reader.read(CHAT))
    assert prompt.text == "User: the cat\n\nAssistant:"
    assert tokenizer.token_to_id("<s>") not in prompt.token_ids
    assert tokenizer.decode(prompt.token_ids) == prompt.text


def test_bad_words_stand_at_the_beginning_and_after_a_space(reader, tokenizer):
    words = reader.bad_words(["cat", " cat", "dog"])
    assert [tokenizer.decode(word) for word in words] == ["cat", " cat", "dog", " dog"]
    assert tokenizer.token_to_id("<s>") not in {token_id for word in words for token_id in word}
    assert reader.bad_words([]) == ()


def test_without_a_template_chats_are_refused(tokenizer):
    with pytest.raises(RequestError, match=r"FAILED_PRECONDITION.*no chat template"):
        asyncio.run(PromptReader(MODEL, tokenizer, None).read(CHAT))
