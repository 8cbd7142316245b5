"""Turns gin's errors into one sentence: the wrong name, its file and the nearest valid name."""

import importlib
import inspect
import logging
import pathlib
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gin.config_parser import ImportStatement

from salt_jax.cli.command_line import PACKAGE, verbs
from salt_jax.cli.config_files import CONFIGS
from salt_jax.cli.setting_groups import settings_of, spellings
from salt_jax.errors import InputError, nearest
from salt_jax.storage import gin_files

# Names in gin files of older versions, and their replacements.
_RENAMED = {
    "optimizers.OptimizerConfig": "AdamW, Adafactor and Muon of optimizers, in optimizers/*.gin",
    "optimizers.LearningRate": "WarmupCosine and the others of training.learning_rates",
}


def explained(
    parse: Callable[..., Any],
    *arguments: Any,
    statements: Sequence[gin_files.Statement] = (),
    flags: Mapping[str, str] = types.MappingProxyType({}),
) -> Any:
    """Calls `parse(*arguments)`, a gin function, and turns gin's errors into an InputError of one
    sentence, which locates names in `statements`, those of all gin files, and has `flags` for
    `display_name`."""
    logging.disable(logging.ERROR)  # gin logs each path at which it doesn't find a file
    try:
        return parse(*arguments)
    except InputError:
        raise
    except (NameError, AttributeError, ValueError, ImportError, TypeError, OSError) as error:
        message, _, location = str(error).partition("\n")
        raise InputError(_gin_sentence(message, location, statements, flags)) from error
    finally:
        logging.disable(logging.NOTSET)


def _gin_sentence(
    message: str,
    location: str,
    statements: Sequence[gin_files.Statement],
    flags: Mapping[str, str],
) -> str:
    place = re.search(r'In file "([^"]*)", line (\d+)', location)
    where = f"{place[1]}, line {place[2]}" if place else gin_files.COMMAND_LINE
    if match := re.match(r"'(\w+)' was not provided by an import statement", message):
        imported = {
            one.bound_name()
            for one in statements
            if isinstance(one, ImportStatement) and place and one.location.filename == place[1]
        }
        known = sorted(imported.union(verbs()) - {match[1]})
        return (
            f"{where}: {match[1]} is not imported there{nearest(match[1], known)}: correct "
            "the name, or add the import of its module."
        )
    if match := re.match(
        r"Couldn't resolve selector ([\w.]+); <module '([\w.]+)'.* has no attribute (\w+)", message
    ):
        if new := _RENAMED.get(match[1]):
            return f"{where}: {match[1]} is from an older version; it was replaced by {new}."
        known = [n for n in vars(importlib.import_module(match[2])) if not n.startswith("_")]
        return f"{where}: {match[1]} is unknown{nearest(match[3], known)}: correct the name."
    if match := re.match(
        r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message
    ):
        names = {name: name for name in _parameters_of(match[1])} | _settings_by_spelling(match[1])
        close = nearest(match[2], names, names)
        return f"{where}: {match[1]} has no setting {match[2]}{close}: correct the name."
    if match := re.match(r"No bindings specified for '(.*)/(?:gin\.)?macro'", message):
        return f"%{match[1]} has no value: correct the name, or add {flag_of(match[1], flags)}."
    if match := re.match(r"No configurable matching '(\S+)'", message):
        return (
            f"{where}: {match[1]} is unknown there: begin the file with `from __gin__ import "
            "dynamic_registration` and the import of its module, or correct the name."
        )
    if match := re.fullmatch(r"No module named '(salt_jax\.[\w.]+)'", message):
        # A module that moves to another folder keeps its file name.
        files = [file.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("*.py")]
        modules = {file.stem: ".".join(file.with_suffix("").parts) for file in files}
        close = nearest(match[1].rpartition(".")[2], modules, modules)
        return f"{where}: there is no module {match[1]}{close}: correct its name."
    if message.startswith("not enough values to unpack"):  # a name without its module
        return f"{where}: write the setting's full name, such as config.TrainConfig.steps."
    if match := re.match(r"(\S+) set to `%gin.REQUIRED`", message):
        name = match[1].removesuffix("/gin.macro.value").removesuffix("/macro.value")
        for whole, binding in gin_files.bindings_in(reversed(statements)):
            # gin shortens the name; the file has it in full.
            is_it = f".{whole}".replace("/", ".").endswith(f".{name}".replace("/", "."))
            if is_it and binding.value == gin_files.REQUIRED:
                name = whole if flag_of(name, flags).startswith("--gin.") else name
                file = pathlib.Path(binding.location.filename)
                shown = file.relative_to(CONFIGS) if file.is_relative_to(CONFIGS) else file
                is_open = f"{display_name(name, flags)} must be set ({shown} leaves it open)"
                return f"{is_open}: add {flag_of(name, flags)}."
        return f"{display_name(name, flags)} must be set: add {flag_of(name, flags)}."
    return f"{where}: {message.rstrip('.')}."


def _parameters_of(selector: str) -> list[str]:
    """Parameter names of the configurable that a selector (decoder.DecoderConfig) names."""
    module_name, _, name = selector.rpartition(".")
    for module in list(sys.modules.values()):
        full_name = getattr(module, "__name__", "")
        is_it = full_name.startswith("salt_jax") and f".{full_name}".endswith(f".{module_name}")
        if is_it and callable(target := getattr(module, name, None)):
            return list(inspect.signature(target).parameters)
    return []


def _settings_by_spelling(selector: str) -> dict[str, str]:
    """A verb's setting names, by likely misspelling; empty unless the selector is the verb's."""
    verb = selector.rpartition(".")[2]
    module = sys.modules.get(f"salt_jax.commands.{verb}")
    if module is None or selector != f"{verb}.{verb}":
        return {}
    settings = settings_of(getattr(module, verb))
    return {name: setting.selector for name, setting in spellings(settings).items()}


def flag_of(name: str, flags: Mapping[str, str]) -> str:
    """The flag that sets a name ("config.Data.cache"): --SETTING if `flags` ("Data.cache" →
    "cache") has one, else --gin.NAME."""
    flag = flags.get(".".join(name.rpartition("/")[2].split(".")[-2:]), f"gin.{name}")
    return f"--{flag}=VALUE"


def display_name(name: str, flags: Mapping[str, str]) -> str:
    """A setting's name for messages: the flag's name for settings of a verb and of
    `training.config`, gin's name for all others."""
    modules = name.split(".")[:-2]  # empty if gin has shortened the name
    is_verbs = {*modules} <= {*verbs(), "config"}
    flag = flag_of(name, flags).removeprefix("--").removesuffix("=VALUE")
    return flag if is_verbs and not flag.startswith("gin.") else name
