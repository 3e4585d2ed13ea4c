"""Makes a prompt of chat messages with the template that the model was trained on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cluster.config import ChatConfig, ConfigError, PresetConfig
from cluster.server.chat.presets import all_presets
from cluster.server.chat.template_process import TemplateError, TemplateProcess
from cluster.server.errors import Code, RequestError
from cluster.server.request import Chat

PLAIN: Final = "plain"
"""Value of `chat.template` for models without a template of their own."""
_PLAIN_TEMPLATE: Final = """\
{%- if bos_token is defined %}{{ bos_token }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'user' %}User: {{ message.content }}
{%- elif message.role == 'assistant' %}Assistant: {{ message.content }}
{%- else %}{{ raise_exception("role '" ~ message.role ~ "' is not system, user or assistant") }}
{%- endif %}{{ "\\n\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""
_PLAIN_SAMPLING: Final = {"stop": ["\nUser:"]}
"""A model that never saw a chat goes on to write the user's part, too."""
_NOTHING: Final = {"tools": None, "documents": None}
"""Templates ask for these; clients cannot send them yet."""
_TIME_LIMIT_S: Final = 2.0
_MAX_CHARS: Final = 16 << 20


class ChatTemplate:
    """A template, the checkpoint's special tokens, and the presets; `render` from any thread."""

    def __init__(
        self,
        template: str,
        special_tokens: Mapping[str, str],
        presets: Mapping[str, PresetConfig],
        sampling: Mapping[str, Any] | None = None,
        *,
        time_limit_s: float = _TIME_LIMIT_S,
        max_chars: int = _MAX_CHARS,
    ) -> None:
        self.presets = presets
        self._special_tokens = special_tokens
        self._sampling = dict(sampling or {})
        self._process = TemplateProcess(template, time_limit_s=time_limit_s, max_chars=max_chars)

    @staticmethod
    def load(model_dir: str | Path, config: ChatConfig) -> "ChatTemplate | None":
        """The template of the configuration, else of the checkpoint; None if neither has one.

        Raises ConfigError for a file or a template that cannot be used.
        """
        presets = all_presets(config)
        directory = Path(model_dir)
        special_tokens = _special_tokens(directory)
        if config.template == PLAIN:
            return ChatTemplate(_PLAIN_TEMPLATE, special_tokens, presets, _PLAIN_SAMPLING)
        path, template = _find(directory, config)
        if template is None:
            return None
        found = ChatTemplate(template, special_tokens, presets)
        try:
            found.start()
        except TemplateError as error:
            raise ConfigError(f"{path}: this chat template {error}") from None
        return found

    def render(self, chat: Chat) -> tuple[str, dict[str, Any]]:
        """The prompt, special tokens included, and defaults of SamplingParams; raises RequestError.

        May take up to the time limit: not for an event loop.
        """
        messages = [
            {"role": message.role, "content": message.content}
            | ({"name": message.name} if message.name is not None else {})
            for message in chat.messages
        ]
        if not messages:
            raise RequestError(Code.INVALID_ARGUMENT, "messages is empty: must have one at least")
        sampling = dict(self._sampling)
        if chat.preset is not None:
            preset = self._preset(chat.preset)
            sampling |= preset.sampling
            if all(message["role"] != "system" for message in messages):
                messages.insert(0, {"role": "system", "content": preset.system})
        values: dict[str, Any] = {**self._special_tokens, **_NOTHING, "messages": messages}
        if taken := values.keys() & chat.template_options.keys():
            raise RequestError(
                Code.INVALID_ARGUMENT,
                f"template option {min(taken)!r}: this one is not the client's",
            )
        values |= {**chat.template_options, "add_generation_prompt": chat.add_generation_prompt}
        try:
            return self._process.render(values), sampling
        except TemplateError as error:
            message = f"messages: the chat template {error}"
            raise RequestError(Code.INVALID_ARGUMENT, message) from None

    def start(self) -> None:
        """Be ready for the first chat; raises TemplateError for a template that cannot be used."""
        self._process.start()

    def close(self) -> None:
        """End the process that renders, if one runs; the next rendering starts another."""
        self._process.close()

    def _preset(self, name: str) -> PresetConfig:
        if name not in self.presets:
            known = ", ".join(sorted(self.presets))
            raise RequestError(
                Code.NOT_FOUND, f"preset {name!r:.200} is not known here; there are: {known}"
            )
        return self.presets[name]


def no_template(model_name: str) -> RequestError:
    """What a chat request gets where the model has no template."""
    return RequestError(
        Code.FAILED_PRECONDITION,
        f"model {model_name!r} has no chat template: set chat.template to a file with one, or to "
        f"{PLAIN!r} for a base model, or send text instead of messages",
    )


def _find(directory: Path, config: ChatConfig) -> tuple[Path, str | None]:
    if config.template is not None:
        path = Path(config.template)
        return path, _read(path, "chat.template: ")
    path = directory / "chat_template.jinja"
    if path.exists():
        return path, _read(path)
    path = directory / "tokenizer_config.json"
    found = _read_json(path).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"{path}: chat_template must be a text, found {found!r:.100}")
    return path, found


def _special_tokens(directory: Path) -> dict[str, str]:
    """`bos_token` and its like; in the file each is a text or has it as its `content`."""
    found = _read_json(directory / "tokenizer_config.json")
    tokens = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in found.items()
        if name.endswith("_token")
    }
    return {name: value for name, value in tokens.items() if isinstance(value, str)}


def _read(path: Path, context: str = "") -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{context}{path}: cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {found!r:.100}")
    return found
