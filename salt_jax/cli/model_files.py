"""Lets a setting name a gin file of a model: --model=models/mini_slm.gin."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import gin
from gin import config_parser
from salt_jax.cli.command_line import require_known
from salt_jax.cli.config_errors import explained
from salt_jax.cli.config_files import find_gin_file, gin_text
from salt_jax.cli.safe_gin import require_safe_file
from salt_jax.cli.setting_groups import alternatives, bound_value, settings_of
from salt_jax.errors import InputError
from salt_jax.storage import gin_files

MODEL_CLASS = "DecoderConfig"


def read_model_files(function: Callable[..., None], safe_gin: bool) -> None:
    """Replaces every DecoderConfig setting that names a gin file by the model of that file.

    The file is read on its own, so bindings for the student or others don't affect the model. Its
    settings are bound in a gin scope named after the setting, so that config.gin has them too.
    """
    for setting in list(settings_of(function)):
        models = [
            t for t in alternatives(setting.hint) if getattr(t, "__name__", "") == MODEL_CLASS
        ]
        value, name = bound_value(setting), setting.name
        if not models or not isinstance(value, str):
            continue
        file = find_gin_file(value, f"--{name}")
        if safe_gin:
            require_safe_file(file, find_gin_file)
        imports, settings = _read_model_file(file)
        fields = inspect.signature(models[0]).parameters
        for field in settings:
            where = f" of {MODEL_CLASS}, which {file} sets"
            require_known("setting", field, fields, where=where)
        defaults = {f.name: f.default for f in fields.values() if f.default is not f.empty}
        if unset := sorted(fields.keys() - defaults.keys() - settings.keys()):
            raise InputError(
                f"{file}, the model of --{name}, does not set {', '.join(unset)} of "
                f"{MODEL_CLASS}: name a file of gin/models."
            )
        having = (m for m in imports if hasattr(explained(importlib.import_module, m), MODEL_CLASS))
        if (module := next(having, None)) is None:
            raise InputError(
                f"{file}, the model of --{name}, imports no module that has {MODEL_CLASS}: add "
                "`from salt_jax.models import decoder` to it."
            )
        model = f"{name}/{module.rpartition('.')[2]}.{MODEL_CLASS}"
        lines = [f"{model}.{field} = {value!r}" for field, value in (defaults | settings).items()]
        explained(gin.parse_config, gin_text([module], *lines, setting.bind(f"@{model}()")))


def _read_model_file(file: str) -> tuple[list[str], dict[str, Any]]:
    """The modules that a model's file and its includes import, and the settings they bind."""
    statements = list(gin_files.statements_of(file, find_gin_file))
    imports = [one.module for one in statements if isinstance(one, config_parser.ImportStatement)]
    settings: dict[str, Any] = {}
    for _, binding in gin_files.bindings_in(statements):
        is_own = binding.selector.rpartition(".")[2] == MODEL_CLASS and not binding.scope
        references = list(gin_files.references_in(binding.value))
        if not is_own or references:
            what = references[0] if is_own else binding.selector
            raise InputError(
                f"{gin_files.place_of(binding)}: {what} has no place in a model's file that a "
                f"setting names: it sets {MODEL_CLASS} alone, to plain values, and may include "
                "files that do."
            )
        settings[binding.arg_name] = binding.value
    return [module for module in imports if module.startswith("salt_jax.")], settings
