"""What gin refuses in; one sentence with the name, the file and the nearest valid name out.

gin's own messages name internals and come with tracebacks. These say what to correct.
"""

import importlib
import inspect
import logging
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gin.config_parser import ImportStatement

from salt_jax import gin_files
from salt_jax.command_line import verbs
from salt_jax.errors import InputError, nearest

CONFIGS = pathlib.Path(__file__).parent / "configs"


def explained(
    parse: Callable[..., Any], *arguments: Any, statements: Sequence[gin_files.Statement] = ()
) -> Any:
    """Calls gin; its errors become one sentence with the name, the file and the nearest name.

    Args:
      parse: What to call.
      *arguments: For it.
      statements: Those of all files, to say where a name comes from.
    """
    logging.disable(logging.ERROR)  # gin logs every place where it looks for a file in vain
    try:
        return parse(*arguments)
    except InputError:
        raise
    except (NameError, AttributeError, ValueError, ImportError, TypeError, OSError) as error:
        message, _, location = str(error).partition("\n")
        raise InputError(_gin_sentence(message, location, statements)) from error
    finally:
        logging.disable(logging.NOTSET)


def _gin_sentence(message: str, location: str, statements: Sequence[gin_files.Statement]) -> str:
    place = re.search(r'In file "([^"]*)", line (\d+)', location)
    where = f"{place[1]}, line {place[2]}" if place else gin_files.COMMAND_LINE
    if match := re.match(r"'(\w+)' was not provided by an import statement", message):
        imported = {
            one.bound_name()
            for one in statements
            if isinstance(one, ImportStatement) and place and one.location.filename == place[1]
        }
        known = sorted(imported.union(verbs()))
        return (
            f"{where}: {match[1]} is not imported there{nearest(match[1], known)}: correct "
            "the name, or add the import of its module."
        )
    if match := re.match(
        r"Couldn't resolve selector ([\w.]+); <module '([\w.]+)'.* has no attribute (\w+)", message
    ):
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
    if match := re.match(r"No configurable matching '(\S+)'", message):
        return (
            f"{where}: {match[1]} is unknown there: begin the file with `from __gin__ import "
            "dynamic_registration` and the import of its module, or correct the name."
        )
    if message.startswith("not enough values to unpack"):  # of a name without a module
        return f"{where}: write a setting's whole name, as train.train.steps, where it is set."
    if match := re.match(r"(\S+) set to `%gin.REQUIRED`", message):
        name = match[1].removesuffix("/gin.macro.value").removesuffix("/macro.value")
        for whole, binding in gin_files.bindings_in(reversed(statements)):
            # gin shortens the name; the file has it in full.
            is_it = f".{whole}".replace("/", ".").endswith(f".{name}".replace("/", "."))
            if is_it and binding.value == gin_files.REQUIRED:
                name = name if plain(name) != name else whole
                file = pathlib.Path(binding.location.filename)
                shown = file.relative_to(CONFIGS) if file.is_relative_to(CONFIGS) else file
                return f"{plain(name)} must be set ({shown} leaves it open): add {flag_of(name)}."
        return f"{plain(name)} must be set: add {flag_of(name)}."
    return f"{where}: {message.rstrip('.')}."


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
