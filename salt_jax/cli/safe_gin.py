"""`--safe_gin`: refuses gin files and bindings that do more than set salt_jax's settings.

gin imports any module that a file names and calls any function in it, so reading a file can run
arbitrary code. Under --safe_gin a file may import only the modules listed below, bind only the
verbs and the names below, and refer only to those names; none of them imports, runs or writes what
its settings name. Settings that would run code (RUN_CODE) are refused. The check parses each file
and its includes with gin's own parser, before gin executes them, and imports nothing.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from gin import config_parser
from salt_jax.cli.command_line import verbs
from salt_jax.errors import InputError, nearest
from salt_jax.storage import gin_files

# Names that files may bind and refer to; verbs may only be bound.
_NAMES = {
    "commands.prepare": "model_vocabulary",
    "data.denoisers": "Objectives SpanDenoiser",
    "data.vocabularies": "ByteVocabulary HuggingFaceVocabulary "
    "SentencePieceVocabulary load_vocabulary",
    "distill.alignment": "Alignment",
    "distill.divergences": "ForwardKL JensenShannon ReverseKL",
    "distill.gates": "Confidence TeacherAhead TruthInTop",
    "distill.losses": "LossConfig",
    "distill.schedules": "Adaptive Constant LinearDecay LinearRatioDecay NoDistillation Step",
    "distill.scores": "LearnableFraction Mean Median",
    "distill.selection": "RandomRows Threshold TopFraction TopRows",
    "evaluation.few_shot": "FewShot",
    "evaluation.held_out": "HeldOut",
    "evaluation.responses": "Responses",
    "huggingface.chat_templates": "model_chat_template",
    "inference.sampling": "Sampling",
    "models.decoder": "DecoderConfig",
    "models.decoder_config": "DecoderConfig",
    "models.rope_scaling": "RopeScaling",
    "preparation.own_text": "own_text",
    "preparation.packing": "Packing",
    "preparation.pile": "pile_files",
    "preparation.runners": "JobRunner",
    "preparation.templates": "Template",
    "preparation.text_files": "TextFiles",
    "preparation.trained_vocabulary": "TrainedVocabulary",
    "training.checkpoints": "CheckpointConfig",
    "training.config": "Data Devices Evaluation Initial Method Teacher TrainConfig",
    "training.learning_rates": "WarmupConstant WarmupCosine WarmupInverseSqrt WarmupStableDecay",
    "training.optimizers": "Adafactor AdamW Muon",
    "training.partitioning": "MeshConfig",
}
NAMES = frozenset(
    f"salt_jax.{module}.{name}" for module, names in _NAMES.items() for name in names.split()
)

# Settings whose value can name code to run, with the harmless values.
_OWN_PROGRAMS = ("~/.cache/salt_jax/programs", "")
RUN_CODE: Mapping[str, tuple[Any, ...]] = {
    "Devices.compilation_cache": _OWN_PROGRAMS,
    "FewShot.allow_code_execution": (False,),
    "FewShot.task_folder": (None,),
    "JobRunner.runner": ("local",),
}

_DYNAMIC_REGISTRATION = "from __gin__ import dynamic_registration"
_WITHOUT = "leave it out, or leave out --safe_gin where you trust who wrote it"


def require_safe_file(file: str, find: gin_files.Finder) -> None:
    """Refuses a gin file that, itself or by an include (resolved by `find`), does more than set
    salt_jax's settings; the InputError has the file and line."""
    _require_safe(gin_files.statements_of(file, find))


def require_safe_bindings(text: str) -> None:
    """The same check for the bindings of a command line; see `require_safe_file`."""
    _require_safe(gin_files.statements_in(text))


def _require_safe(statements: Iterable[Any]) -> None:
    # Imports by file. A file without dynamic registration may use any name that some module has
    # registered, so none of its names can be checked, and all are refused.
    imported: dict[str, dict[str, str]] = {}
    for statement in statements:
        file, where = statement.location.filename, gin_files.place_of(statement)
        modules = imported.get(file, {})
        if isinstance(statement, config_parser.IncludeStatement):
            raise InputError(f"{where}: a flag cannot include a file ({statement.filename!r}).")
        if isinstance(statement, config_parser.ImportStatement):
            # Compared whole: "import __gin__.dynamic_registration" is an ordinary import.
            if statement.format() == _DYNAMIC_REGISTRATION:
                imported.setdefault(file, {})
                continue
            _require_own_module(statement.module, where)
            is_whole = statement.is_from or statement.alias
            modules[statement.bound_name()] = statement.module if is_whole else "salt_jax"
            continue
        is_binding = isinstance(statement, config_parser.BindingStatement)
        if not is_binding or statement.arg_name:  # a macro's name is not a selector
            _require_own_name(statement.selector, modules, where, _own_names())
        if is_binding:
            for reference in gin_files.references_in(statement.value):
                if name := reference.configurable:  # a verb as a value would be run
                    _require_own_name(name, modules, where, NAMES)
            _require_no_code(statement, where)


@functools.cache
def _own_names() -> frozenset[str]:
    return NAMES | {f"salt_jax.commands.{verb}.{verb}" for verb in verbs()}


def _require_own_module(module: str, where: str) -> None:
    own = {name.rpartition(".")[0] for name in _own_names()}
    if module not in own:
        raise InputError(
            f"{where}: --safe_gin keeps gin from importing {module}, which is not a module of "
            f"salt_jax that has settings{nearest(module, own)}: {_WITHOUT}."
        )


def _require_own_name(
    name: str, modules: Mapping[str, str], where: str, own: frozenset[str]
) -> None:
    first, _, rest = name.partition(".")
    if first not in modules:
        raise InputError(
            f"{where}: {first} is not imported there{nearest(first, modules)}, and "
            "--safe_gin lets gin look nowhere else: correct the name, or import its module after "
            f"`{_DYNAMIC_REGISTRATION}`."
        )
    if f"{modules[first]}.{rest}" not in own:
        last_names = {one.rpartition(".")[2] for one in own}
        raise InputError(
            f"{where}: {name} is not among the names that --safe_gin allows there"
            f"{nearest(name.rpartition('.')[2], last_names)}: {_WITHOUT}."
        )


def _require_no_code(statement: config_parser.BindingStatement, where: str) -> None:
    owner, setting = statement.selector.rpartition(".")[2], statement.arg_name
    harmless = RUN_CODE.get(f"{owner}.{setting}", (statement.value,))
    if statement.value not in harmless:
        raise InputError(
            f"{where}: --safe_gin allows {setting} of {owner} to be only "
            f"{' or '.join(map(repr, harmless))}, since other values name code to run: {_WITHOUT}."
        )
