"""The tree of a verb's settings: its parameters, and the fields of those that are dataclasses.

A flag names a setting by a unique end of its path: --cache is data.cache unless another group has a
`cache` too, --teacher.step is method.teacher.step. A flag that names a group with a `path` field
sets that field: --teacher=RUN.
"""

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import gin
from salt_jax.cli.command_line import ROOT, shortest
from salt_jax.errors import InputError, nearest
from salt_jax.storage.run_folder import RunFolder

# gin references that a flag may hold instead of a plain value, alone or in brackets.
_REFERENCE = re.compile(r"[@%][A-Za-z_][\w./]*(\(\))?")
_REFERENCES = re.compile(r"[\[({].*[@%][A-Za-z_]", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A parameter of a verb, or a field of a group of its settings.

    Attributes:
      path: "method.teacher.step".
      owner, scope: The function or class whose parameter it is, and its gin scope or "".
      name, hint, default: The parameter's; the default may be inspect.Parameter.empty.
      group: The class or function that constructs it, if it is a group of settings.
    """

    path: str
    owner: Callable[..., Any]
    scope: str
    name: str
    hint: Any
    default: Any
    group: Callable[..., Any] | None = None

    @property
    def selector(self) -> str:
        """Its name in gin once the owner's module is imported: "config.Teacher.step"."""
        module = self.owner.__module__.rpartition(".")[2]
        return f"{self.scope and self.scope + '/'}{module}.{self.owner.__qualname__}.{self.name}"

    def bind(self, value: str) -> str:
        """The gin source that binds it to a value written in gin's syntax."""
        return f"{import_of(self.owner)}\n{self.selector} = {value}"


def is_reference(value: Any) -> bool:
    """Whether a bound value is @NAME(), @NAME or %MACRO."""
    return isinstance(value, gin.config.ConfigurableReference)


def is_macro(value: Any) -> bool:
    """Whether a bound value is %MACRO."""
    return is_reference(value) and value.configurable.selector == "gin.macro"


def is_required(value: Any) -> bool:
    """Whether a bound value is %gin.REQUIRED."""
    return is_reference(value) and value.configurable.selector == "gin.constant"


def import_of(target: Callable[..., Any]) -> str:
    """The gin statement that imports a function's or class's module."""
    package, _, module = target.__module__.rpartition(".")
    return f"from {package} import {module}" if package else f"import {module}"


def settings_of(
    function: Callable[..., Any], path: tuple[str, ...] = (), scope: str = ""
) -> Iterator[Setting]:
    """Every setting of a verb's function; a group comes before its own settings.

    A group's settings are those of the class that gin binds to it, or else of its type hint.
    """
    constructor = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(constructor)
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, Any)
        if hint is RunFolder:
            continue
        own = (*path, name) if path or name != ROOT else ()
        setting = Setting(".".join(own), function, scope, name, hint, parameter.default)
        value = bound_value(setting)
        _refuse_class(value, setting)
        group, inner = _group(value, hint)
        yield dataclasses.replace(setting, group=group)
        if group is not None:
            yield from settings_of(group, own, inner)


def _bindings(function: Callable[..., Any], scope: str) -> dict[str, Any]:
    with gin.config_scope(scope or None):
        try:
            return gin.get_bindings(function, resolve_references=False)
        except ValueError:  # not registered: no gin file names it
            return {}


def _group(value: Any, hint: Any) -> tuple[Callable[..., Any] | None, str]:
    """The class or function that constructs a group, and its gin scope."""
    if is_reference(value):
        made = value.configurable.wrapped
        is_made = value.evaluate and not value.configurable.selector.startswith("gin.")
        is_group = is_made and isinstance(made, type | types.FunctionType)
        return (made, "/".join(value.scopes)) if is_group else (None, "")
    classes = filter(inspect.isclass, alternatives(hint) if value is None else ())
    return next((part for part in classes if dataclasses.is_dataclass(part)), None), ""


def _refuse_class(value: Any, setting: Setting) -> None:
    """Refuses a class, @NAME, where an instance, @NAME(), is meant."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if is_reference(each) and not each.evaluate and inspect.isclass(each.configurable.wrapped):
            name = "/".join([*each.scopes, each.configurable.name])
            raise InputError(
                f"{setting.selector} is the class @{name}, expected an instance: add the "
                f"brackets, @{name}()."
            )


def alternatives(hint: Any) -> Sequence[Any]:
    """The types of a union, or the one type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def bound_value(setting: Setting) -> Any:
    """The value that gin has bound to a setting, macros resolved; None if unbound."""
    value: Any = _bindings(setting.owner, setting.scope).get(setting.name)
    while is_macro(value):
        with gin.config_scope("/".join(value.scopes)):
            value = gin.get_bindings("gin.macro", resolve_references=False).get("value")
    return value


def flags_of(function: Callable[..., Any]) -> dict[str, str]:
    """The flag of every setting of a verb, by owner and name: "Data.cache" → "cache"."""
    every = [setting for setting in settings_of(function) if setting.path]
    paths = [setting.path for setting in every]
    return {
        f"{s.owner.__qualname__}.{s.name}": shortest(paths, s.path.removesuffix(".path"))
        for s in every
    }


def default_groups(function: Callable[..., Any]) -> Iterator[str]:
    """gin source that binds each unbound group that is not optional, outer groups first."""
    for setting in settings_of(function):
        if setting.group is not None and type(None) not in alternatives(setting.hint):
            yield from _link(setting)


def _link(setting: Setting, instead_of_none: bool = False) -> Iterator[str]:
    """gin source that binds a group unless it is bound (with `instead_of_none`, unless to None)."""
    is_bound = setting.name in _bindings(setting.owner, setting.scope)
    is_none = instead_of_none and bound_value(setting) is None
    if (is_none or not is_bound) and setting.group:
        module = setting.group.__module__.rpartition(".")[2]
        made = f"@{module}.{setting.group.__qualname__}()"
        yield f"{import_of(setting.group)}\n{setting.bind(made)}"


def bindings_of(
    function: Callable[..., Any], name: str, values: Sequence[str], macros: Collection[str] = ()
) -> Iterator[str]:
    """gin source for a flag --name=VALUE ("cache", "teacher.step"), which may be repeated;
    `macros`, set by gin files, are suggested for a misspelt name. InputError if the name is unknown
    or ambiguous, or the value is missing."""
    every = {setting.path: setting for setting in settings_of(function) if setting.path}
    setting = every[_find(name, every, macros, function.__name__)]
    is_plain = values[-1] != "None" and not _REFERENCE.fullmatch(values[-1])
    if is_plain and f"{setting.path}.path" in every:
        setting = every[f"{setting.path}.path"]
    macro = name.rpartition(".")[2].upper()
    if is_plain and setting.group is not None and macro in macros:
        raise InputError(
            f"--{name}={values[-1]}: a gin file sets {setting.path} to an object that is "
            f"configured by --gin.{macro}={values[-1]}."
        )
    for path, outer in every.items():
        if outer is not setting and setting.path.startswith(f"{path}."):
            yield from _link(outer, instead_of_none=True)
    yield setting.bind(_literal(name, values, setting))


def _find(name: str, every: dict[str, Setting], macros: Iterable[str], verb: str) -> str:
    if name in every:
        return name
    found = [path for path in every if path.endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    if found:
        flags = ", ".join(f"--{shortest([*every], path)}" for path in found)
        raise InputError(f"--{name} could be any of {flags}: write which one is meant.")
    known = {
        spelling: f"--{shortest([*every], one.path.removesuffix('.path'))}"
        for spelling, one in spellings(every.values()).items()
    }
    known |= {macro.lower(): f"--gin.{macro}" for macro in macros}
    close = nearest(name.replace(".", "_").lower(), known, known)
    raise InputError(f"There is no setting --{name}{close}: `salt {verb} --help` lists them.")


def spellings(settings: Iterable[Setting]) -> dict[str, Setting]:
    """Settings by path, flag and name, in lower case, dots as underscores (flags of older versions
    looked like "data_seed")."""
    every = {setting.path: setting for setting in settings if setting.path}
    found: dict[str, Setting] = {}
    for path, setting in every.items():
        flag = shortest([*every], path.removesuffix(".path"))
        for name in (path, path.removesuffix(".path"), flag):
            found[name.replace(".", "_").lower()] = setting
    return found


def _literal(name: str, values: Sequence[str], setting: Setting) -> str:
    """A flag's values in gin's syntax."""
    kinds = alternatives(setting.hint)
    lists = [part for part in kinds if typing.get_origin(part) in (Sequence, list, tuple)]
    of_texts = any(str in typing.get_args(part) for part in lists)
    if (
        "" in values
        and not (of_texts and str not in kinds)
        and not isinstance(setting.default, str)
    ):
        raise InputError(f"--{name} needs a value: --{name}=VALUE.")
    if bool in kinds:
        values = [v.capitalize() if v.lower() in ("true", "false") else v for v in values]
    literals = [repr(v) if _is_text(v, of_texts or str in kinds) else v for v in values]
    is_whole = len(literals) == 1 and literals[0].startswith(("(", "["))
    is_one = len(literals) == 1 and str in kinds
    return f"({', '.join(literals)},)" if lists and not is_whole and not is_one else literals[-1]


def _is_text(value: str, texts: bool) -> bool:
    """Whether a flag's value is a string, rather than a Python literal or a gin reference."""
    if _REFERENCE.fullmatch(value) or value == "None":
        return False
    if texts or _REFERENCES.match(value):
        return texts
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return True
    return False
