"""What gin refuses in; one sentence with the name, the file and the nearest valid name out.

gin's own messages name internals and come with tracebacks. These say what to correct.
"""

import importlib
import inspect
import logging
import pathlib
import re
import sys
import tokenize
from collections.abc import Callable, Sequence
from typing import Any

from salt_jax.command_line import verbs
from salt_jax.errors import InputError, nearest

CONFIGS = pathlib.Path(__file__).parent / "configs"

# What took the place of names that files of older versions have.
_RENAMED = {
    "optimizers.OptimizerConfig": "AdamW, Adafactor and Muon of optimizers, in optimizers/*.gin",
    "optimizers.LearningRate": "WarmupCosine and the others of training.learning_rates",
}


def explained(
    parse: Callable[..., Any], *arguments: Any, files: Sequence[pathlib.Path] = ()
) -> Any:
    """Calls gin; its errors become one sentence with the name, the file and the nearest name."""
    logging.disable(logging.ERROR)  # gin logs every place where it looks for a file in vain
    try:
        return parse(*arguments)
    except InputError:
        raise
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}" if error.filename else "the command line"
        raise InputError(
            f"{where}: {str(error.text).strip()!r} cannot be read: a line is an import, an include "
            "or a setting, NAME = VALUE, and a text has quotes of its own, NAME = 'text'."
        ) from error
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        text_or_file = str(arguments[0])
        where = "the command line" if "\n" in text_or_file else f"{text_or_file}, line {line}"
        raise InputError(f"{where}: a bracket or a text is left open ({message}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{arguments[0]} is no gin file: it is not text ({error}).") from error
    except RecursionError as error:
        raise InputError(f"{arguments[0]} includes itself: take that include out.") from error
    except (NameError, AttributeError, ValueError, ImportError, TypeError, OSError) as error:
        message, _, location = str(error).partition("\n")
        raise InputError(_gin_sentence(message, location, files)) from error
    finally:
        logging.disable(logging.NOTSET)


def _gin_sentence(message: str, location: str, files: Sequence[pathlib.Path]) -> str:
    place = re.search(r'In file "([^"]*)", line (\d+)', location)
    where = f"{place[1]}, line {place[2]}" if place else "the command line"
    if match := re.match(r"'(\w+)' was not provided by an import statement", message):
        imported = re.findall(r"from [\w.]+ import (\w+)", _text_of(place)) + verbs()
        return (
            f"{where}: {match[1]} is not imported there{nearest(match[1], imported)}: correct "
            "the name, or add the import of its module."
        )
    if match := re.match(
        r"Couldn't resolve selector ([\w.]+); <module '([\w.]+)'.* has no attribute (\w+)", message
    ):
        if new := _RENAMED.get(match[1]):
            return f"{where}: {match[1]} is of an older version; now there are {new}."
        known = [n for n in vars(importlib.import_module(match[2])) if not n.startswith("_")]
        return f"{where}: {match[1]} is unknown{nearest(match[3], known)}: correct the name."
    if match := re.match(
        r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message
    ):
        known = _parameters_of(match[1])
        return (
            f"{where}: {match[1]} has no setting {match[2]}{nearest(match[2], known)}: "
            "correct the name."
        )
    if match := re.match(r"No bindings specified for '(.*)/(?:gin\.)?macro'", message):
        return f"%{match[1]} has no value: correct the name, or add {flag_of(match[1])}."
    if message.startswith("not enough values to unpack"):  # of a name without a module
        return f"{where}: write a setting's whole name, as train.train.steps, where it is set."
    if match := re.match(r"(\S+) set to `%gin.REQUIRED`", message):
        name = match[1].removesuffix("/gin.macro.value").removesuffix("/macro.value")
        # gin shortens the name; the file has it in full.
        for file in files:
            pattern = rf"^\s*((?:\w+[./])*{re.escape(name)})\s*=\s*%gin\.REQUIRED"
            if found := re.search(pattern, file.read_text(), re.M):
                name = plain(found[1])
                shown = file.relative_to(CONFIGS) if file.is_relative_to(CONFIGS) else file
                return f"{name} must be set ({shown} leaves it open): add {flag_of(found[1])}."
        return f"{plain(name)} must be set: add {flag_of(name)}."
    return f"{where}: {message.rstrip('.')}."


def _text_of(place: re.Match[str] | None) -> str:
    if place is None:
        return ""
    paths = [pathlib.Path(place[1]), CONFIGS / place[1]]
    return next((p.read_text() for p in paths if p.is_file()), "")


def _parameters_of(selector: str) -> list[str]:
    """Parameter names of what a selector such as decoder.DecoderConfig names."""
    module_name, _, name = selector.rpartition(".")
    for module in list(sys.modules.values()):
        full_name = getattr(module, "__name__", "")
        is_it = full_name.startswith("salt_jax") and f".{full_name}".endswith(f".{module_name}")
        if is_it and callable(target := getattr(module, name, None)):
            return list(inspect.signature(target).parameters)
    return []


def flag_of(name: str) -> str:
    """The flag that sets a name: --SETTING for a verb's own, --gin.NAME for any other."""
    return f"--{plain(name)}=VALUE" if plain(name) != name else f"--gin.{name}=VALUE"


def plain(name: str) -> str:
    """A setting as it is called on the command line: `steps` of train.train.steps; those that are
    no verb's own keep their whole names."""
    owner, _, setting = name.rpartition(".")
    module, _, function = owner.partition(".")
    return setting if module in verbs() and function in ("", module) else name
