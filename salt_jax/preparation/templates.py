"""Templates that turn a row's fields into a prompt and a response.

With the prompt "Question: {question}\\nAnswer:" and the response " {answer}":

    {"question": "2 + 3?", "answer": "5"}
    "Question: 2 + 3?\\nAnswer:" and " 5"

A plain document is a row without a prompt, whose response is its `text`.
"""

import dataclasses
import functools
import string
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from salt_jax.errors import InputError, nearest
from salt_jax.huggingface.chat_templates import ChatTemplate

_MOST_NAMED = 8  # fields of a row to list in an error
_LONGEST_SHOWN = 40  # characters of a value to show in an error


class Unfit(ValueError):  # noqa: N818 (says what the row is)
    """A row that a template cannot use; the message says why, without the row's place."""


class NoResponse(Unfit):
    """A row whose response is empty."""


class Filled(NamedTuple):
    """A filled template: a prompt, "" for a plain document, and the expected response."""

    prompt: str
    response: str


@dataclasses.dataclass(frozen=True)
class Template:
    """Turns a row into a prompt and a response.

    A field is named in braces and must hold a string; "{document:.2000}" takes its first 2,000
    characters, "{{" is a brace.

    Attributes:
      prompt: For example "Question: {question}\\nAnswer:"; "" makes plain documents.
      response: For example " {answer}".
      words: Replacements of a field's values: {"label": {"0": "true", "1": "false"}}. Such a field
        may hold numbers, but only these values.
      chat: A model's chat template. All of a row's `messages` but the last are then the prompt, and
        the last one, the assistant's, is the response, up to the token that ends a document.
        `prompt` and `response` both name the field of the messages, "{messages}".
      parse_special: Whether the name of a special token in a prompt and its response
        ("<|im_start|>") stands for that token; in plain documents it never does.
    """

    prompt: str = ""
    response: str = "{text}"
    words: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    parse_special: bool = True
    chat: ChatTemplate | None = None

    def __post_init__(self) -> None:
        if not self._fields_of("response"):
            raise InputError(
                f"The template response is {self.response!r} and names no field: write the field "
                "that holds the response in braces, as in ' {answer}'."
            )
        for field in self.words:
            if field not in self.fields:
                raise InputError(
                    f"Template.words is of the field {field!r}{nearest(field, self.fields)}, the "
                    f"templates name {', '.join(self.fields)}: correct one of the two."
                )

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields it names, without duplicates, those of the prompt first."""
        return tuple(dict.fromkeys([*self._fields_of("prompt"), *self._fields_of("response")]))

    def fill(self, row: Mapping[str, Any]) -> Filled:
        """The row's prompt and response.

        Raises:
          Unfit: A field is missing, not a string, or not among its `words`; or NoResponse: the
            response is empty.
        """
        if self.chat is not None:
            return _conversation(self.chat, row.get(self.fields[0]))
        values = {field: self._value(field, row) for field in self.fields}
        answered = any(values[field].strip() for field in self._fields_of("response"))
        if self.prompt and not answered:
            named = ", ".join(f"`{field}`" for field in self._fields_of("response"))
            raise NoResponse(f"this row's response is empty (it is made of {named})")
        prompt, response = (
            "".join(
                literal + ("" if field is None else format(values[field], spec))
                for literal, field, spec in self._parts[name]
            )
            for name in ("prompt", "response")
        )
        return Filled(prompt, response)

    def _value(self, field: str, row: Mapping[str, Any]) -> str:
        value = row.get(field)
        if (words := self.words.get(field)) is not None:
            if str(value) not in words:
                raise Unfit(
                    f"the `{field}` of this row is {value!r}, expected one of {', '.join(words)}"
                )
            return words[str(value)]
        if value is None:
            names = [str(name) for name, each in row.items() if each is not None]
            held = ", ".join(f"`{name}`" for name in names[:_MOST_NAMED]) or "no fields"
            raise Unfit(f"this row has no `{field}`{nearest(field, names)}, it has {held}")
        if not isinstance(value, str):
            text = repr(value)
            shown = text if len(text) <= _LONGEST_SHOWN else f"a {type(value).__name__}"
            raise Unfit(f"the `{field}` of this row is {shown}, expected a string")
        return value

    def _fields_of(self, name: str) -> list[str]:
        return [field for _, field, _ in self._parts[name] if field is not None]

    @functools.cached_property
    def _parts(self) -> dict[str, list[tuple[str, str | None, str]]]:
        """(literal, the field after it or None, the field's format), by template."""
        return {name: list(_parsed(name, getattr(self, name))) for name in ("prompt", "response")}


def _conversation(chat: ChatTemplate, messages: Any) -> Filled:
    """The prompt made of all messages but the last, and the last as the response."""
    try:
        whole = chat(messages, answer=False)
        prompt = chat(messages[:-1]) if messages[-1]["role"] == "assistant" else ""
    except InputError as error:
        raise Unfit(str(error).removesuffix(".")) from error
    if not prompt or not whole.startswith(prompt):
        raise Unfit(
            "the last of these messages is not an assistant's, or the chat template does not "
            "append it to the others"
        )
    response, end = whole[len(prompt) :], chat.tokens.get("eos_token", "")
    if end and response.rstrip().endswith(end):
        response = response.rstrip().removesuffix(end)
    if not response.strip():
        raise NoResponse("the last of these messages is empty")
    return Filled(prompt, response)


def _parsed(name: str, template: str) -> Iterator[tuple[str, str | None, str]]:
    try:
        for literal, field, spec, conversion in string.Formatter().parse(template):
            if field is not None:
                if not field or conversion:
                    raise ValueError("braces must hold a field's name")
                format("", spec or "")
            yield literal, field, spec or ""
    except ValueError as error:
        raise InputError(
            f"The template {name} is {template!r}, which cannot be read ({error}): write a field "
            "as {name}, and a brace that is text twice."
        ) from error
