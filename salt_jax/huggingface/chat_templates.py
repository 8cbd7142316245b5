"""Renders a conversation with a model's chat template, as transformers' `apply_chat_template` does.

Templates come with models and are untrusted: they run in Jinja's sandbox on plain JSON values.
"""

import dataclasses
import datetime
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from salt_jax.errors import InputError
from salt_jax.huggingface.tokenizer_classes import token_text
from salt_jax.huggingface.tokenizer_files import (
    SETTINGS_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FOLDER,
    tokenizer_settings,
)
from salt_jax.storage.json_files import valid_unicode
from salt_jax.storage.local_copies import local_run

TEMPLATE_FILE = "chat_template.jinja"

# Errors that a template's code can raise beside Jinja's own.
_RAISED = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError),
    *(AttributeError, RecursionError),
)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template.

    Attributes:
      source: Its Jinja source.
      tokens: The special tokens by their names in it, {"bos_token": "<s>"}.
    """

    source: str
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __call__(self, messages: Any, answer: bool = True) -> str:
        """The conversation as text; InputError if the template rejects the messages.

        Args:
          messages: [{"role": "user", "content": "Hello"}], with any other keys the template reads.
          answer: Whether to append the beginning of an answer (`add_generation_prompt`).
        """
        roles = [
            each.get("role") if isinstance(each, dict) else None
            for each in (messages if isinstance(messages, list) else [])
        ]
        if not roles or not all(isinstance(role, str) for role in roles):
            raise InputError(
                'messages must be a list of objects like {"role": "user", "content": "TEXT"}.'
            )
        # Some data has null for missing values, which templates would print.
        given = [{k: v for k, v in each.items() if v is not None} for each in messages]
        try:
            text = self._compiled.render(
                messages=given,
                tools=None,
                documents=None,
                add_generation_prompt=answer,
                **self.tokens,
            )
        except _RAISED as error:
            raise InputError(f"the model's chat template rejects them ({error}).") from error
        return valid_unicode(text)

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled template, so that it can be sent to other processes."""
        return {"source": self.source, "tokens": self.tokens}

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Answers, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        return environment.from_string(self.source)


def load_chat_template(folder: pathlib.Path) -> ChatTemplate | None:
    """The template among a tokenizer's files, or None.

    A separate file takes precedence over tokenizer_config.json; of several templates there, the one
    named "default" is used.
    """
    settings = tokenizer_settings(folder / SETTINGS_FILE)
    source = settings.get("chat_template")
    if isinstance(source, list):  # {"name": …, "template": …} each
        named = [each for each in source if isinstance(each, dict)]
        source = {each.get("name"): each.get("template") for each in named}
    if isinstance(source, dict):
        source = source.get("default")
    if (folder / TEMPLATE_FILE).is_file():
        try:
            source = (folder / TEMPLATE_FILE).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{folder / TEMPLATE_FILE} is not UTF-8 ({error}): convert the file, or choose "
                "another model."
            ) from error
    if not isinstance(source, str):
        return None
    named_tokens = tokenizer_settings(folder / SPECIAL_TOKENS_FILE) | settings
    found = {n: token_text(t) for n, t in named_tokens.items() if n.endswith("_token")}
    tokens = {name: text for name, text in found.items() if text is not None}
    return ChatTemplate(source, tokens)


def model_chat_template(model: str) -> ChatTemplate:
    """The chat template of an imported model, by its run's folder; InputError if it has none."""
    template = load_chat_template(local_run(model) / TOKENIZER_FOLDER)
    if template is None:
        raise InputError(
            f"The model {model} has no chat template: give prompts and responses by templates of "
            "your own (PROMPT and RESPONSE), or name a model that has one."
        )
    return template


class _Answers(jinja2.ext.Extension):
    """Jinja extension: {% generation %} … {% endgeneration %} marks answers to train on."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes."""
    pair = None if separators is None else (separators[0], separators[1])
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys
    )
