"""gin files and bindings that can be read without trusting who wrote them: `--safe_gin=True`.

In: the text that gin is to read, before it does. Out: nothing, or one sentence with file and line.

gin imports any module that a file names, and calls any function in it: reading a file can run
anything. Here a file may bind nothing but the verbs and the names below, and refer to nothing but
those names, none of which imports, runs or writes what its settings name, and import nothing but
their modules. Settings of theirs that do are refused as well. What is checked is what was parsed,
with gin's own parser, of every file that is included too; nothing is imported for it.
"""

import functools
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gin import config_parser
from salt_jax.command_line import verbs
from salt_jax.errors import InputError, nearest

# What files may bind and refer to; the verbs they may bind.
NAMES = frozenset(
    f"salt_jax.{name}"
    for name in (
        "data.chat_templates.model_chat_template",
        *("data.denoisers.Objectives", "data.denoisers.SpanDenoiser", "data.templates.Template"),
        *("data.vocabularies.ByteVocabulary", "data.vocabularies.SentencePieceVocabulary"),
        *("data.vocabularies.HuggingFaceVocabulary", "data.vocabularies.load_vocabulary"),
        *("distill.losses.LossConfig", "distill.schedules.NoDistillation"),
        *("distill.schedules.Constant", "distill.schedules.Step"),
        *("distill.schedules.LinearDecay", "distill.schedules.LinearRatioDecay"),
        *("distill.selection.TopRows", "distill.selection.TopFraction"),
        *("distill.selection.Threshold", "distill.selection.RandomRows"),
        *("evaluation.responses.Responses", "models.decoder.DecoderConfig"),
        *("models.decoder_config.DecoderConfig", "models.sampling.Sampling"),
        *("preparation.own_text.own_text", "preparation.pile.pile_files"),
        *("preparation.text_files.TextFiles", "preparation.trained_vocabulary.TrainedVocabulary"),
        *("training.checkpoints.CheckpointConfig", "training.optimizers.LearningRate"),
        *("training.optimizers.OptimizerConfig", "training.partitioning.MeshConfig"),
    )
)

# Settings of the verbs by which what they name is run, and the values that do no such thing.
_OWN_PROGRAMS = ("~/.cache/salt_jax/programs", "")
RUN_CODE: Mapping[str, tuple[Any, ...]] = {
    **{
        f"{verb}.compilation_cache": _OWN_PROGRAMS
        for verb in ("evaluate", "generate", "score", "train")
    },
    "evaluate.allow_code_execution": (False,),
    "evaluate.task_folder": (None,),
    "prepare.runner": ("local",),
}

_DYNAMIC_REGISTRATION = "from __gin__ import dynamic_registration"
_WITHOUT = "leave it out, or leave out --safe_gin where you trust who wrote it"


class _Elsewhere:
    """A value that comes from a macro, or from what another name gives."""


class _References(config_parser.ParserDelegate):
    """Notes the references of a statement, wherever they stand in its value."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def configurable_reference(self, scoped_name: str, evaluate: bool) -> _Elsewhere:
        self.found.append(scoped_name.rpartition("/")[2])
        return _Elsewhere()

    def macro(self, name: str) -> _Elsewhere:
        return _Elsewhere()


def require_safe_file(
    file: str, find: Callable[[str, str], str], seen: frozenset[str] = frozenset()
) -> None:
    """Refuses a gin file, and those that it includes, that could do more than set our settings.

    Args:
      file: Which.
      find: Gives the path of an included file; its second argument is the file that includes it.
      seen: The files that include it.

    Raises:
      InputError: With file and line.
      SyntaxError, ValueError, OSError, TokenError: What gin raises for what it cannot read.
    """
    with open(file) as lines:
        includes = list(_require_safe(lines, file))
    for included in includes:
        path = find(included, file)
        if path not in seen:
            require_safe_file(path, find, seen | {file, path})


def require_safe_bindings(text: str) -> None:
    """Refuses the bindings of a command line likewise; see `require_safe_file`."""
    for included in _require_safe(text, ""):
        raise InputError(f"the command line: include {included!r} has no place in a flag.")


def _require_safe(lines: typing.TextIO | str, file: str) -> Iterator[str]:
    """Checks a text; yields the files that it includes."""
    references = _References()
    parser = config_parser.ConfigParser(lines, references)
    is_dynamic, modules = False, dict[str, str]()
    for statement in parser:
        where = f"{file}, line {statement.location.line_num}" if file else "the command line"
        if isinstance(statement, config_parser.ImportStatement):
            # As a whole: "import __gin__.dynamic_registration" is an import as any other.
            if statement.format() == _DYNAMIC_REGISTRATION:
                is_dynamic = True
                continue
            _require_own_module(statement.module, where)
            # Else gin looks names up among all that any module has registered.
            if is_dynamic:
                is_whole = statement.is_from or statement.alias
                modules[statement.bound_name()] = statement.module if is_whole else "salt_jax"
        elif isinstance(statement, config_parser.IncludeStatement):
            yield statement.filename
        else:
            # A macro's name is no selector: it has no setting.
            is_macro = getattr(statement, "arg_name", None) == ""
            if not is_macro:
                _require_own_name(statement.selector, modules, where, _own_names())
            for name in references.found:
                _require_own_name(name, modules, where, NAMES)  # a value that is a verb runs it
            if isinstance(statement, config_parser.BindingStatement) and not is_macro:
                _require_no_code(statement, where)
            references.found.clear()


@functools.cache
def _own_names() -> frozenset[str]:
    return NAMES | {f"salt_jax.commands.{verb}.{verb}" for verb in verbs()}


def _require_own_module(module: str, where: str) -> None:
    own = {name.rpartition(".")[0] for name in _own_names()}
    if module not in own:
        raise InputError(
            f"{where}: --safe_gin keeps gin from importing {module}, which is none of the modules "
            f"of salt_jax that have settings{nearest(module, own)}: {_WITHOUT}."
        )


def _require_own_name(
    name: str, modules: Mapping[str, str], where: str, own: frozenset[str]
) -> None:
    first, _, rest = name.partition(".")
    if first not in modules:
        raise InputError(
            f"{where}: {first} is not imported there{nearest(first, modules)}, and "
            "--safe_gin lets gin look nowhere else: correct the name, or import its module, after "
            f"`{_DYNAMIC_REGISTRATION}`."
        )
    if f"{modules[first]}.{rest}" not in own:
        last_names = {one.rpartition(".")[2] for one in own}
        raise InputError(
            f"{where}: {name} is none of the names that --safe_gin lets gin use there"
            f"{nearest(name.rpartition('.')[2], last_names)}: {_WITHOUT}."
        )


def _require_no_code(statement: config_parser.BindingStatement, where: str) -> None:
    verb, setting = statement.selector.rpartition(".")[2], statement.arg_name
    harmless = RUN_CODE.get(f"{verb}.{setting}", (statement.value,))
    if statement.value not in harmless:
        raise InputError(
            f"{where}: --safe_gin allows {setting} of `salt {verb}` to be "
            f"{' or '.join(map(repr, harmless))} only, since what else it names is run: {_WITHOUT}."
        )
