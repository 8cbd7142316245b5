"""`salt convert`: imports Hugging Face models as checkpoints, and exports checkpoints to them.

--huggingface=FOLDER imports a downloaded model as a run's folder, for --teacher, --scorer,
--initial and --model. Its steps can be imported one by one into one folder. --model=RUN exports a
folder that transformers loads. Tensors of safetensors, or of a GGUF file, are converted one at a
time. The families are those of `huggingface/families/`, and your own.
"""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from salt_jax.cli.verb import Verb
from salt_jax.data.vocabularies import VOCABULARY_FOLDER, Vocabulary, load_vocabulary
from salt_jax.errors import InputError, require_counts, visible
from salt_jax.huggingface import hub, model_tokenizers, tokenizer_files
from salt_jax.huggingface.families import FAMILIES
from salt_jax.huggingface.family import Family, vocab_multiple
from salt_jax.huggingface.gguf_files import SUFFIX, GGUFFile, TensorFiles
from salt_jax.huggingface.model_config import config_from_json, config_to_json
from salt_jax.huggingface.model_folders import CONFIG_FILE, repository_id, require_config
from salt_jax.huggingface.safetensors_files import (
    DOWNLOAD,
    DTYPES,
    SafetensorsFolder,
    TensorInfo,
    write_shards,
)
from salt_jax.huggingface.tensors import Rule, refuse_other_tensors, rules_for_files, tensor_shapes
from salt_jax.huggingface.tokenizer_files import GENERATION_FILE, TOKENIZER_FOLDER
from salt_jax.models.decoder import DecoderConfig
from salt_jax.storage.durable_files import write_text
from salt_jax.storage.json_files import read_json_object
from salt_jax.storage.local_copies import local_file, local_folder
from salt_jax.storage.run_folder import (
    CHECKPOINTS_FOLDER,
    RUN_FILE,
    SUMMARY_FILE,
    RunFolder,
    to_json,
)
from salt_jax.terminal import say
from salt_jax.training.checkpoint_digests import complete_digests
from salt_jax.training.checkpoint_items import require_path
from salt_jax.training.checkpoints import SavedModel, complete_steps, find_model, read_progress
from salt_jax.training.converted_checkpoints import save_streamed
from salt_jax.training.converted_tensors import (
    inspected_digest,
    parameters_of,
    tables_of,
    tensors_of,
)

# Settings that change no tensor when a model is exported again.
CHANGES_NO_RESULT = ("convert.max_shard_bytes",)

COMPUTE_DTYPES = ("float32", "bfloat16")

_COMPARED_ROWS = 1024
_AS_FLOAT32 = "AutoModelForCausalLM.from_pretrained(FOLDER).float().save_pretrained(NEW_FOLDER)"


def convert(
    run: RunFolder,
    *,
    huggingface: str | None = None,
    revision: str | None = None,
    model: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    compute_dtype: str | None = None,
    eos_token: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    drop_padding: bool | None = None,
    families: Sequence[Family] = (),
) -> None:
    """Imports or exports a model in Hugging Face's format.

    Args:
      run: The folder for the run, or for the files.
      huggingface: A model to import: a folder with config.json, safetensors, tokenizer.json or
        tokenizer.model, or the name of a repository on the Hugging Face Hub
        ("EleutherAI/pythia-1.4b"), which is downloaded, or a GGUF file of a Llama.
      revision: The repository's branch, tag or commit; "main" by default.
      model: The run folder of a model to export.
      step: The imported checkpoint's step, 0 by default; or the step to export, the newest by
        default.
      dtype: The parameters' dtype, "float32", "bfloat16" or "float16"; unchanged by default.
      compute_dtype: An imported model's dtype of activations and products, "float32" or
        "bfloat16"; by default "bfloat16" if the parameters have 16 bits.
      eos_token: The token that ends a document, if the imported folder doesn't name it.
      max_shard_bytes: The most bytes of values in an exported file.
      drop_padding: Export no rows of the embedding beyond the vocabulary. By default those of a
        model trained here are dropped, since it never learned that these ids don't occur (its own
        evaluation masks them out; transformers would give them most of the probability), and those
        of an imported model are kept.
      families: Model families that are tried before the built-in ones.

    Raises:
      InputError: There is no such model, no family describes it, its files are damaged, its values
        are not finite or don't fit dtype, or the folder holds something else. Nothing is written.
    """
    if (huggingface is None) == (model is None):
        given = "neither is" if model is None else "both are"
        raise InputError(
            f"huggingface is what to import and model what to export, and {given} set: set one, "
            "--huggingface=FOLDER or --model=RUN."
        )
    for name, value, known in (
        ("dtype", dtype, tuple(DTYPES)),
        ("compute_dtype", compute_dtype, COMPUTE_DTYPES),
    ):
        if value not in (None, *known):
            raise InputError(
                f"{name} is {value!r}, expected one of {', '.join(known)}: change --{name}."
            )
    require_counts(0, step=step)
    if max_shard_bytes < 1:
        raise InputError(
            f"max_shard_bytes is {max_shard_bytes} and must be at least 1: change "
            "--max_shard_bytes."
        )
    known_families = (*families, *FAMILIES)
    if huggingface is not None:
        if drop_padding is not None:
            raise InputError("drop_padding is for --model=RUN: leave it unset.")
        with _opened(huggingface, revision) as (source, files):
            require_path(run.path)
            more = dtype, compute_dtype, eos_token, known_families
            _import(run, source, files, step or 0, *more)
    else:
        if not compute_dtype == eos_token == revision is None:
            raise InputError(
                "compute_dtype, eos_token and revision are for --huggingface=FOLDER: leave them "
                "unset."
            )
        saved = find_model(str(model), step, "model")
        dtype = dtype or saved.config.param_dtype
        _export(run, saved, dtype, max_shard_bytes, drop_padding, known_families)


@contextlib.contextmanager
def _opened(name: str, revision: str | None) -> Iterator[tuple[pathlib.Path, TensorFiles]]:
    """A model's folder and its tensors; for a GGUF file, the folder is made of its metadata."""
    source = _source(name, revision)
    if source.suffix != SUFFIX:
        require_config(name, source)
        yield source, SafetensorsFolder(source)
        return
    file = GGUFFile(source)
    if file.quantized:
        say(
            f"{source} is quantized ({', '.join(file.quantized)}): what it holds is an "
            "approximation of the model that it was made of."
        )
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent, source.name)  # as errors name it
        folder.mkdir()
        file.describe(folder)
        yield folder, file


def _source(name: str, revision: str | None) -> pathlib.Path:
    """The folder of a model, given as a folder or as a repository on the Hub, or a GGUF file."""
    if name.endswith(SUFFIX) and revision is None:
        return local_file(name)
    named = hub.split_name(name)
    if named is None and not pathlib.Path(name).exists() and (repository := repository_id(name)):
        named = repository, None
    if named is None:
        if revision is not None:
            raise InputError(
                f"revision is {revision!r} and huggingface is {name!r}, on this machine: leave "
                "--revision unset, or name a repository of the Hub, --huggingface=OWNER/NAME."
            )
        return local_folder(name)
    if named[1] and revision not in (None, named[1]):
        raise InputError(f"huggingface is {name!r} and revision is {revision!r}: name one of them.")
    return hub.download(named[0], named[1] or revision)


def _import(
    run: RunFolder,
    source: pathlib.Path,
    files: TensorFiles,
    step: int,
    dtype: str | None,
    compute_dtype: str | None,
    eos_token: str | None,
    families: Sequence[Family],
) -> None:
    """Imports tensors, and what the other files of the folder `source` say about them."""
    settings, where = read_json_object(source / CONFIG_FILE, DOWNLOAD), files.path / CONFIG_FILE
    vocabulary = model_tokenizers.model_vocabulary(source, eos_token, families)
    model_tokenizers.require_rows(vocabulary, settings.get("vocab_size"), source)
    if complete_steps(run.path) and (run.path / VOCABULARY_FOLDER).is_dir():
        # If equal, the existing vocabulary stays, since the steps there name it.
        kept = load_vocabulary(run.path / VOCABULARY_FOLDER)
        vocabulary = kept if kept == vocabulary else vocabulary
    family, config = config_from_json(settings, vocabulary.base_size, str(where), families)
    rules = rules_for_files(family.rules(config), files.tensors)
    shapes = {name: tensor.shape for name, tensor in files.tensors.items()}
    refuse_other_tensors(config, rules, shapes, family.head, str(files.path))
    if config.tied_embeddings and family.head in shapes:
        _refuse_another_head(files, tables_of(rules)[0], family.head)
    of_files = _dtype_of(files, config, rules)
    # 1 + w has more digits than w.
    dtype = dtype or ("float32" if family.norm_offset else of_files)
    compute_dtype = compute_dtype or ("float32" if dtype == "float32" else "bfloat16")
    config = dataclasses.replace(config, param_dtype=dtype, dtype=compute_dtype)
    for other in complete_steps(run.path):
        _require_same_model(run.path, other, config, vocabulary)
    if _is_there(run.path, step, files):
        say(f"{run.path} has step {step} of {files.path} already: nothing was converted.")
        return
    run.require_space(config.num_parameters * DTYPES[dtype].itemsize, "the parameters")
    if unread := family.unread_fields(settings):
        say(
            f"{where} sets {visible(', '.join(unread))}, which no forward pass of "
            f"{family.model_type} reads: ignored."
        )
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        say(
            f"{where} scales the rotary embedding by a text's length: the model takes its original "
            f"context, {config.max_length} tokens, alone."
        )
    source_digest = inspected_digest(files, config, rules)
    for note in vocabulary.notes:
        say(note)
    run.begin(replace=True)
    vocabulary.save(run.path / VOCABULARY_FOLDER)
    tokenizer_files.copy_tokenizer(source, run.path / TOKENIZER_FOLDER)
    ends = tokenizer_files.end_ids(source)
    if ends and not (source / GENERATION_FILE).exists():
        text = to_json({"eos_token_id": ends})  # as transformers reads it from config.json
        write_text(run.path / TOKENIZER_FOLDER / GENERATION_FILE, text + "\n")
    progress = {
        "model": config.to_json(),
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "counters": {},
        "converted_from": str(files.path.resolve()),
        "source_digest": source_digest,
    }
    digest = save_streamed(run.path, step, parameters_of(files, config, rules), progress)
    identity = {"path": str(run.path), "step": step, "digest": digest}
    _summarize(run, family, config, {"model": identity}, f"step {step}:")


def _refuse_another_head(files: TensorFiles, embedding: str, head: str) -> None:
    """Refuses a head tensor that differs from the tied embedding: then config.json is wrong."""
    size, same = files.tensors[embedding].shape, files.tensors[head].shape
    for first in range(0, size[0] if size == same else 0, _COMPARED_ROWS):
        rows = slice(first, min(first + _COMPARED_ROWS, size[0]))
        ours, theirs = (files.read(name, rows).view(np.uint8) for name in (embedding, head))
        if not np.array_equal(ours, theirs):
            same = ()
            break
    if size != same:
        raise InputError(
            f"{files.path / CONFIG_FILE} sets tie_word_embeddings, and {head} is another tensor "
            f"than {embedding}: set it to false there if the model has a head of its own."
        )


def _dtype_of(files: TensorFiles, config: DecoderConfig, rules: list[Rule]) -> str:
    """The tensors' dtype; float32 if they have several, since it represents the others exactly."""
    found = set()
    for name, _ in tensor_shapes(config, rules):
        dtype = files.tensors[name].dtype
        if dtype not in DTYPES:
            advice = "choose a version of the model that is not quantized"
            if dtype == "F64":
                dtype, advice = "float64", f"make it float32 with transformers, {_AS_FLOAT32}"
            raise InputError(
                f"The tensor {name} of {files.path} is of {dtype}, expected one of "
                f"{', '.join(DTYPES)}: {advice}."
            )
        found.add(dtype)
    return found.pop() if len(found) == 1 else "float32"


def _require_same_model(
    path: pathlib.Path, step: int, config: DecoderConfig, vocabulary: Vocabulary
) -> None:
    """Refuses a run's folder that holds a step of another model."""
    progress = read_progress(path, step)
    if "converted_from" not in progress:
        raise InputError(
            f"The output folder {path} holds a run that trained: choose another --output_dir."
        )
    there = DecoderConfig.from_json(progress["model"])
    differing = {
        name: f"{name} {value!r} (here {getattr(config, name)!r})"
        for name, value in vars(there).items()
        if value != getattr(config, name)
    }
    if differing and differing.keys() <= {"dtype", "param_dtype"}:
        raise InputError(
            f"{path} holds step {step} with --dtype={there.param_dtype} "
            f"--compute_dtype={there.dtype}, and this is --dtype={config.param_dtype} "
            f"--compute_dtype={config.dtype}: give all steps the same two, or choose another "
            "--output_dir."
        )
    other = f"another model, with {', '.join(differing.values())}" if differing else ""
    if not other and progress["vocabulary_fingerprint"] != vocabulary.fingerprint:
        other = "a model with another tokenizer"
    if other:
        raise InputError(f"{path} holds step {step} of {other}: choose another --output_dir.")


def _is_there(path: pathlib.Path, step: int, files: TensorFiles) -> bool:
    """Whether a run's folder already has this step of these weights; refuses other weights."""
    if (path / CONFIG_FILE).exists():
        raise InputError(
            f"{path} holds a model in Hugging Face's files, not a run: choose another --output_dir."
        )
    if step not in complete_steps(path):
        return False
    complete_digests(path / CHECKPOINTS_FOLDER / str(step), ("params", "progress"))
    progress = read_progress(path, step)
    if progress["source_digest"] != files.digest:
        raise InputError(
            f"{path} has a step {step}, of other weights (those that {progress['converted_from']} "
            f"held then) than {files.path} has: change --step, or choose another --output_dir."
        )
    return True


def _export(
    run: RunFolder,
    saved: SavedModel,
    dtype: str,
    max_shard_bytes: int,
    drop_padding: bool | None,
    families: Sequence[Family],
) -> None:
    config = saved.config
    if drop_padding is None:
        drop_padding = "converted_from" not in read_progress(saved.run_path, saved.step)
    vocabulary = saved.load_vocabulary()
    rows = vocabulary.size if drop_padding else config.padded_vocab_size
    tokens = {"eos_token_id": vocabulary.eos_id, "bos_token_id": vocabulary.start_id}
    family, settings = config_to_json(config, rows, dtype, tokens, families)
    old = _files_of_a_model(run.path)
    if old and not (run.path / RUN_FILE).exists():
        raise InputError(
            f"{run.path} holds a {old[0].name} that `salt convert` didn't write: choose another "
            "--output_dir."
        )
    rules = family.rules(config)
    tables = tables_of(rules)
    tensors = [
        TensorInfo(name, dtype, (rows, *shape[1:]) if name in tables else shape)
        for name, shape in tensor_shapes(config, rules)
    ]
    total = sum(tensor.num_bytes for tensor in tensors)
    run.require_space(total, "the tensors")
    run.begin(may_change=CHANGES_NO_RESULT)
    # config.json makes the folder a model, so it is removed first and written last.
    for file in old:
        file.unlink()
    try:
        arrays = tensors_of(saved, rules, DTYPES[dtype], rows)
        names = write_shards(run.path, tensors, arrays, max_shard_bytes)
        written = tokenizer_files.copy_tokenizer(saved.path / TOKENIZER_FOLDER, run.path)
        if not written:
            written = model_tokenizers.write_tokenizer(vocabulary, run.path)
        settings |= {"eos_token_id": tokenizer_files.settle_generation(run.path, tokens)}
    except InputError:
        for file in (run.path / SUMMARY_FILE, *_files_of_a_model(run.path)):
            file.unlink(missing_ok=True)
        run.withdraw()
        raise
    if not written:
        say(f"transformers has no tokenizer like {vocabulary}: none was written.")
    write_text(run.path / CONFIG_FILE, to_json(settings, indent=2) + "\n")
    files = [*written, *names, CONFIG_FILE]
    multiple = vocab_multiple(vocabulary.size, rows)
    given = dataclasses.replace(config, vocab_size=vocabulary.size, vocab_multiple=multiple)
    more = {"model": saved.identity, "bytes": total, "files": files}
    _summarize(run, family, given, more)


def _files_of_a_model(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a Hugging Face model in a folder, config.json first."""
    names = [CONFIG_FILE, *tokenizer_files.tokenizer_files(folder)]
    files = [folder / name for name in names if (folder / name).exists()]
    return files + sorted(folder.glob("model*.safetensors*"))


def _summarize(
    run: RunFolder, family: Family, config: DecoderConfig, more: Mapping[str, Any], step: str = ""
) -> None:
    run.write_summary(
        {
            "architecture": family.model_type,
            "num_parameters": config.num_parameters,
            "config": config.to_json(),
            **more,
        }
    )
    say(
        f"{run.path} has {step}{' ' * bool(step)}a {family.model_type} of "
        f"{config.num_parameters:,} parameters, {config.vocab_size:,} ids in "
        f"{config.padded_vocab_size:,} rows."
    )


VERB = Verb(convert, changes_no_result=CHANGES_NO_RESULT)
