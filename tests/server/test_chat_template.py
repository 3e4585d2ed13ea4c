"""Prompts of chats are those that transformers makes; what is hostile is bounded and fails alone."""

import json
import re
import time

import pytest
from transformers import PreTrainedTokenizerFast

from cluster.config import ChatConfig, ConfigError
from cluster.engine.sampling_params import SamplingParams
from cluster.server.chat.presets import BUILT_IN
from cluster.server.chat.template import ChatTemplate
from cluster.server.errors import Code, RequestError
from cluster.server.request import Chat, ChatMessage
from tests.server.serving import byte_level_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

DEEPSEEK_V3 = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(system='', is_first=true) %}\
{%- for message in messages if message['role'] == 'system' -%}
{%- set ns.system = ns.system + ('' if ns.is_first else '\n\n') + message['content'] -%}
{%- set ns.is_first = false -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages -%}
{%- if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}
{%- elif message['role'] == 'assistant' -%}
{%- set content = message['content'].split('</think>')[-1] -%}
{{ '<|Assistant|>' + content + eos_token }}
{%- endif -%}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% if thinking is defined and thinking %}\
{{ '<think>\n' }}{% endif %}{% endif %}"""

QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{% endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" %}
        {%- set ns.last_query = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "assistant" and loop.index0 < ns.last_query and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content | trim + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

MIXTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the system message, roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system is defined %}
            {{- ' [INST] ' + system + '\n\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

# What the three have not: filters with HTML in the text, JSON, dates, macros, {% generation %}.
ODDITIES = """\
{% macro show(message) %}<{{ message.role|upper }}> {{ message|tojson(indent=1) }}{% endmacro %}
{{ strftime_now('%Y') }} {{ dict(a=1).a }} {{ none is none }} {{ unknown }}
{% for message in messages %}
  {% if loop.first %}{% continue %}{% endif %}
  {{ show(message) }}{% generation %}{{ message.content|replace('<', '(') }}{% endgeneration %}

{% endfor %}"""

CONVERSATION = [
    {"role": "system", "content": 'Answer in <b>rhymes</b> & "quotes"; 请回答。'},
    {"role": "user", "content": "  Why is the sky blue?\n"},
    {"role": "assistant", "content": "<think>hm</think>\nLight scatters & that's it."},
    {"role": "user", "content": "{{ bos_token }} {% raw %} 🦆 <|Assistant|>"},
]


def chat(conversation, **more):
    return Chat(messages=tuple(ChatMessage(**message) for message in conversation), **more)


def refusal(template, conversation=CONVERSATION, **more):
    try:
        with pytest.raises(RequestError) as caught:
            template.render(chat(conversation, **more))
    finally:
        template.close()
    return caught.value


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), **SPECIAL)


@pytest.mark.parametrize(
    "source", [DEEPSEEK_V3, QWEN3, MIXTRAL, ODDITIES], ids=["deepseek", "qwen", "mixtral", "odd"]
)
def test_equals_transformers(source, tokenizer):
    template = ChatTemplate(source, SPECIAL, {})
    for options in ({}, {"thinking": True, "enable_thinking": False}):
        for num_messages in (2, 4):
            for prompted in (True, False):
                messages = CONVERSATION[:num_messages]
                expected = tokenizer.apply_chat_template(
                    messages,
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=prompted,
                    **options,
                )
                asked = chat(messages, add_generation_prompt=prompted, template_options=options)
                assert template.render(asked) == (expected, {})
                assert len(expected) > 40
    template.close()


class TestWhereTheTemplateComesFrom:
    def test_own_file_then_jinja_file_then_tokenizer_config(self, tmp_path):
        def first_words():
            template = ChatTemplate.load(tmp_path, config)
            text, _ = template.render(chat(CONVERSATION))
            template.close()
            return text

        config = ChatConfig()
        assert ChatTemplate.load(tmp_path, config) is None
        tokens = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
        named = [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "from the list"},
        ]
        settings = tmp_path / "tokenizer_config.json"
        settings.write_text(json.dumps(tokens | {"chat_template": named}))
        assert first_words() == "from the list"
        settings.write_text(
            json.dumps(tokens | {"chat_template": "{{ bos_token }}{{ eos_token }}"})
        )
        assert first_words() == "<s></s>"
        (tmp_path / "chat_template.jinja").write_text("from jinja")
        assert first_words() == "from jinja"
        (tmp_path / "mine").write_text("mine")
        config = ChatConfig(template=str(tmp_path / "mine"))
        assert first_words() == "mine"

    def test_plain_is_for_base_models(self, tmp_path):
        template = ChatTemplate.load(tmp_path, ChatConfig(template="plain"))
        text, sampling = template.render(chat(CONVERSATION[:2], preset="math-tutor"))
        with pytest.raises(RequestError, match="role 'tool' is not system, user or assistant"):
            template.render(chat([{"role": "tool", "content": "1"}]))
        template.close()
        assert (
            text == f"{CONVERSATION[0]['content']}\n\nUser:   Why is the sky blue?\n\n\nAssistant:"
        )
        assert sampling == {"stop": ["\nUser:"], **BUILT_IN["math-tutor"].sampling}

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            (
                "chat_template.jinja",
                "\n{% for %}",
                "chat_template.jinja: this chat template has an error in line 2",
            ),
            ("chat_template.jinja", b"\xff", "chat_template.jinja: cannot be read"),
            ("chat_template.jinja", "{{ 9 ** (9 ** 9) }}", "takes longer than 2 s"),
            ("tokenizer_config.json", "{", "tokenizer_config.json: is not JSON"),
            ("tokenizer_config.json", "[]", "expected a JSON object"),
            ("tokenizer_config.json", '{"chat_template": 7}', "must be a text, found 7"),
        ],
    )
    def test_a_file_that_cannot_be_used_is_named(self, tmp_path, name, content, message):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            ChatTemplate.load(tmp_path, ChatConfig())

    def test_a_missing_file_is_named_with_its_option(self, tmp_path):
        with pytest.raises(ConfigError, match=r"chat\.template: .*/none: cannot be read"):
            ChatTemplate.load(tmp_path, ChatConfig(template=f"{tmp_path}/none"))


class TestPresets:
    def test_system_message_goes_before_those_that_have_none(self):
        template = ChatTemplate("{{ messages|tojson }}", {}, BUILT_IN)
        text, sampling = template.render(chat(CONVERSATION[1:2], preset="translator"))
        own, _ = template.render(chat(CONVERSATION[:2], preset="translator"))
        template.close()
        system = {"role": "system", "content": BUILT_IN["translator"].system}
        assert json.loads(text) == [system, CONVERSATION[1]]
        assert json.loads(own) == CONVERSATION[:2]
        assert sampling == BUILT_IN["translator"].sampling

    def test_the_configuration_adds_and_replaces(self, tmp_path):
        presets = {"pirate": {"system": "Arr."}, "translator": {"system": "Ja."}}
        config = ChatConfig(template="plain", presets=presets)
        template = ChatTemplate.load(tmp_path, config)
        assert template.presets.keys() == BUILT_IN.keys() | {"pirate"}
        text, _ = template.render(chat(CONVERSATION[1:2], preset="translator"))
        template.close()
        assert text.startswith("Ja.\n\nUser: ")

    def test_an_unknown_one_is_not_found(self):
        error = refusal(ChatTemplate("", {}, BUILT_IN), preset="poet")
        assert error.code is Code.NOT_FOUND
        assert "'poet' is not known here; there are: brainstormer, code-assistant" in error.message

    def test_sampling_is_checked_when_read(self, tmp_path):
        presets = {"odd": {"system": "x", "sampling": {"temprature": 1}}}
        with pytest.raises(
            ConfigError, match=r"chat\.presets\.odd\.sampling: unknown .*temprature"
        ):
            ChatTemplate.load(tmp_path, ChatConfig(presets=presets))

    @pytest.mark.parametrize("name", BUILT_IN)
    def test_built_in_ones_are_usable(self, name):
        SamplingParams.from_dict(BUILT_IN[name].sampling)
        assert len(BUILT_IN[name].system) > 200


LONG = "{% for i in range(99999) %}"
HOSTILE = {
    "loops": (f"{LONG}{LONG}{{% endfor %}}{{% endfor %}}", "takes longer than 1 s"),
    "regress": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
    "memory": ("{{ 'a' * 10**10 }}", "needs too much memory"),
    "padding": ("{{ 'a'.ljust(10**12) }}", "needs too much memory"),
    "power": ("{{ 9 ** (9 ** 9) }}", "takes longer than 1 s"),
    "nesting": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}{{ ns.x }}",
        "takes longer than 1 s|needs too much memory",
    ),
    "output": (f"{LONG}{{{{ messages[0].content * 10 }}}}{{% endfor %}}", "more than 100000 char"),
    "escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses: .* is unsafe"),
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "mutation": ("{{ messages.append(1) }}", "refuses: .* is unsafe|not safely callable"),
    "format": ("{{ '{0.__class__.x}'.format(1) }}", "refuses: .* is unsafe"),
}


class TestHostile:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_templates_are_bounded(self, name):
        source, message = HOSTILE[name]
        template = ChatTemplate(source, {}, {}, time_limit_s=1, max_chars=100_000)
        error = refusal(template)
        assert error.code is Code.INVALID_ARGUMENT
        assert re.search(message, error.message), error.message

    def test_one_rendering_that_is_ended_leaves_the_next_alone(self):
        source = "{% if messages|length > 1 %}" + HOSTILE["loops"][0] + "{% endif %}ok"
        template = ChatTemplate(source, {}, {}, time_limit_s=1)
        for _ in range(2):
            with pytest.raises(RequestError, match="takes longer"):
                template.render(chat(CONVERSATION))
            assert template.render(chat(CONVERSATION[:1])) == ("ok", {})
        template.close()

    def test_options_cannot_take_the_place_of_messages(self):
        template = ChatTemplate("{{ messages }}", SPECIAL, {})
        for name in ("messages", "tools", "bos_token"):
            error = refusal(template, template_options={name: "x"})
            assert error.code is Code.INVALID_ARGUMENT
            assert repr(name) in error.message

    def test_lone_surrogates_and_depth(self):
        template = ChatTemplate("{{ x }}", {}, {})
        assert "surrogates" in refusal(template, template_options={"x": "\ud800"}).message
        deep = []
        for _ in range(100_000):
            deep = [deep]
        assert "nested" in refusal(template, template_options={"x": deep}).message

    def test_no_messages(self):
        assert "messages is empty" in refusal(ChatTemplate("x", {}, {}), []).message

    def test_renderings_take_turns_and_are_quick(self):
        """The limit is of one rendering; a process is started once, not for each."""
        template = ChatTemplate(QWEN3, {}, {})
        template.render(chat(CONVERSATION))
        process = template._process._process
        begun = time.monotonic()
        for _ in range(200):
            template.render(chat(CONVERSATION))
        assert template._process._process is process
        assert time.monotonic() - begun < 20
        template.close()
