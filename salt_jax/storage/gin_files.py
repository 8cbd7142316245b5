"""Parses the statements of gin files and bindings with gin's own parser, without executing them.

Imports and bindings are yielded in the order in which they take effect, those in blocks too.
"""

import dataclasses
import io
import pathlib
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from gin import config_parser
from salt_jax.errors import InputError

# gin's BindingStatement, BlockDeclaration or ImportStatement, which are not typed.
Statement = Any
# Finds a gin file's path by its name; the second argument is what to correct if there is none.
Finder = Callable[[str, str], str]

COMMAND_LINE = "the command line"


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference as written: "%STEPS", "@decoder.DecoderConfig()"."""

    text: str

    def __repr__(self) -> str:
        return self.text

    @property
    def macro(self) -> str:
        """The macro's name, "" if it isn't one."""
        return self.text[1:] if self.text[0] == "%" and self != REQUIRED else ""

    @property
    def configurable(self) -> str:
        """The configurable's name without scopes and parentheses, "" for a macro."""
        return self.text[1:].removesuffix("()").rpartition("/")[2] if self.text[0] == "@" else ""


REQUIRED = Reference("%gin.REQUIRED")


class _References(config_parser.ParserDelegate):
    """A parser delegate that leaves references and macros unresolved."""

    def configurable_reference(self, name: str, evaluate: bool) -> Reference:
        return Reference(f"@{name}{'()' if evaluate else ''}")

    def macro(self, name: str) -> Reference:
        return Reference(f"%{name}")


class _NamedText(io.StringIO):
    """Text with a file name, which its statements record."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text, newline=None)
        self.name = name


def open_text(path: str) -> io.StringIO:
    """A gin file's text, UTF-8 in any locale, without a byte order mark; InputError if it is not
    text."""
    reason = "it has NUL bytes"
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text, reason = "\0", str(error)
    if "\0" in text:
        raise InputError(
            f"{path} is not a gin file: it is not UTF-8 text ({reason}): name another file, or "
            "save it as UTF-8."
        )
    return _NamedText(text, path)


def statements_in(text: str) -> Iterator[Statement]:
    """The statements of a text, includes unexpanded; InputError, with the line, if gin cannot parse
    it."""
    return _parsed(io.StringIO(text), "")


def statements_of(file: str, find: Finder, above: tuple[str, ...] = ()) -> Iterator[Statement]:
    """The statements of a file, with includes expanded.

    Args:
      file: Its path.
      find: Finds the files that it includes.
      above: The files that include it.

    Raises:
      InputError: gin cannot parse it, with file and line; a file is missing, not text, or includes
        itself.
    """
    if file in above:
        raise InputError(f"{file} includes itself: remove that include.")
    for statement in _parsed(open_text(file), file):
        if isinstance(statement, config_parser.IncludeStatement):
            included = find(statement.filename, place_of(statement))
            yield from statements_of(included, find, (*above, file))
        else:
            yield statement


def references_in(value: Any) -> Iterator[Reference]:
    """The references in a value, however deeply nested."""
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, Mapping):
        yield from references_in([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references_in(item)


def bindings_in(statements: Iterable[Statement]) -> Iterator[tuple[str, Statement]]:
    """The bindings among statements, each with the name it sets: "config.Data.seed", "STEPS",
    "big/decoder.DecoderConfig.num_layers"."""
    for one in statements:
        if isinstance(one, config_parser.BindingStatement):
            name = f"{one.selector}.{one.arg_name}" if one.arg_name else one.selector
            yield f"{one.scope}/{name}" if one.scope else name, one


def place_of(statement: Statement) -> str:
    """The file and line of a statement."""
    file = statement.location.filename
    return f"{file}, line {statement.location.line_num}" if file else COMMAND_LINE


def _parsed(lines: io.StringIO, file: str) -> Iterator[Statement]:
    try:
        yield from config_parser.ConfigParser(lines, _References())
    except SyntaxError as error:
        where = f"{file}, line {error.lineno}" if file else COMMAND_LINE
        raise InputError(
            f"{where}: {str(error.text).strip()!r} cannot be parsed: a line is an import, an "
            "include or a setting, NAME = VALUE, alone or indented below NAME:, and a string has "
            "its own quotes, NAME = 'text'."
        ) from error
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        where = f"{file}, line {line}" if file else COMMAND_LINE
        raise InputError(
            f"{where}: a bracket or string is left open, or nested too deeply ({message})."
        ) from error
    except RecursionError as error:
        raise InputError(f"{file or COMMAND_LINE}: brackets are nested too deeply.") from error
