"""`salt generate`: continues prompts with a trained model.

    salt generate --model=out/salt --prompt='Salt is' --prompt='In 1492' --output_dir=out/texts
    salt generate --model=out/salt --prompts=prompts.jsonl --temperature=0.8 --top_p=0.95 \\
        --stop=$'\\n\\n' --max_new_tokens=200 --output_dir=out/texts

Completions are printed as they are made, those of the longest prompts first. generations.jsonl
holds them in the order of the prompts: prompt, completion (which ends before a stop text), token
ids, their log-probabilities (before temperature, top-k and top-p; nats), and the reason it ended:
"end of document", "stop text" or "length".
"""

import collections
import json
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from salt_jax.cli.verb import Verb
from salt_jax.commands._hub_models import local_model
from salt_jax.data.file_kinds import kind_of
from salt_jax.data.text_lines import Broken, json_rows, text_lines
from salt_jax.errors import InputError
from salt_jax.huggingface.chat_templates import ChatTemplate, load_chat_template
from salt_jax.huggingface.tokenizer_files import TOKENIZER_FOLDER
from salt_jax.inference.generation import Generator, Sampling, Work
from salt_jax.storage.buckets import open_file
from salt_jax.storage.durable_files import write_text
from salt_jax.storage.local_copies import local_file
from salt_jax.storage.run_folder import RunFolder
from salt_jax.terminal import say
from salt_jax.training import compilation
from salt_jax.training.checkpoints import SavedModel, find_model
from salt_jax.training.config import Devices

GENERATIONS_FILE = "generations.jsonl"

_HALF_A_PAIR = re.compile("[\ud800-\udfff]")


def generate(
    run: RunFolder,
    *,
    model: str,
    step: int | None = None,
    prompt: Sequence[str] = (),
    prompts: str | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    prepend_start: bool = True,
    parse_special: bool = True,
    batch_size: int = 16,
    devices: Devices = Devices(),
) -> None:
    """Continues prompts with a checkpoint.

    Args:
      run: The folder for the results.
      model: The run folder of the model.
      step: The checkpoint; the newest by default.
      prompt: A prompt; the flag may be repeated.
      prompts: A file of prompts instead: .txt, one per line, or .jsonl, in the field "prompt" or
        "text", or in "messages", [{"role": "user", "content": "TEXT"}], for the model's chat
        template. May be compressed.
      max_new_tokens: The most new tokens per prompt.
      sampling: How each token is chosen.
      stop: A text to stop at; the flag may be repeated.
      prepend_start: Whether the vocabulary's start comes before a prompt that doesn't begin with
        it; False for models that were trained without one, such as Pythia. Never before messages.
      parse_special: Whether the name of a special token in a prompt ("<|im_start|>") stands for
        that token; otherwise it is plain text. In messages it always does.
      batch_size: Prompts at once.
      devices: The mesh, and where compiled programs are kept.

    Raises:
      InputError: There is no such model, no prompt or too long a one, or a setting is out of range.
    """
    given = _given(prompt, prompts)
    saved = find_model(local_model(model), step, "model")
    vocabulary = saved.load_vocabulary()
    template = load_chat_template(saved.path / TOKENIZER_FOLDER)
    start = [vocabulary.start_id] if prepend_start else []
    texts, ids = [], []
    for place, asked in given:
        # A chat template writes the start token itself, if there is one.
        is_chat = isinstance(asked, list)
        text = _written(saved, place, asked, template) if is_chat else asked
        encoded = vocabulary.encode(text, parse_special or is_chat)
        texts.append(text)
        ids.append(encoded if is_chat or encoded[:1] == start else [*start, *encoded])
    mesh, ends = devices.mesh.make(), saved.end_ids()
    generator = Generator(
        saved.config, vocabulary, mesh, devices.rules, batch_size=batch_size, end_ids=ends
    )
    generator.check(ids, max_new_tokens, stop, prepend_start=False)
    run.begin(replace=True)
    compilation.use_compilation_cache(devices.compilation_cache)
    # Held in the compute dtype, since reading the parameters is most of a token's cost.
    params = saved.load_params(mesh, devices.rules, saved.config.dtype)
    records: list[dict[str, Any]] = [{}] * len(texts)
    began = time.perf_counter()
    for completion in generator.stream(
        params, ids, max_new_tokens, sampling=sampling, stop_texts=stop, prepend_start=False
    ):
        text = texts[completion.index]
        say(*f"[{completion.index}] {text}\n→ {completion.text}\n".split("\n"))
        records[completion.index] = {
            "prompt": text,
            "completion": completion.text,
            "ids": completion.ids,
            "log_probabilities": completion.log_probabilities,
            "ended_by": completion.ended_by,
        }
    seconds = time.perf_counter() - began
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(run.path / GENERATIONS_FILE, lines)
    summary = _summary(generator.work, records, seconds)
    run.write_summary({"model": saved.identity, **summary})


def _given(prompt: Sequence[str], prompts: str | None) -> list[tuple[str, Any]]:
    """The prompts of the command line or of a file, each with its place."""
    if bool(prompt) == (prompts is not None):
        raise InputError(
            f"prompt is {tuple(prompt)} and prompts is {prompts}: set one of them, --prompt=TEXT "
            "or --prompts=FILE."
        )
    if prompts is None:
        for text in prompt:
            if _HALF_A_PAIR.search(text):
                raise InputError(f"prompt is {text!r}, which is not UTF-8: change --prompt.")
        return [("", text) for text in prompt]
    kind = kind_of(prompts)
    if kind.suffix != ".txt" and not kind.is_json:
        raise InputError(f"prompts is {prompts!r}: name a .txt file, or a .jsonl one.")
    path = local_file(prompts)
    try:
        with open_file(path)[0] as file:
            rows = json_rows(path, file, strict=True) if kind.is_json else _lines(path, file)
            given = [(place, _field(place, row)) for place, row in rows]
    except OSError as error:
        raise InputError(
            f"prompts is {path}, which cannot be read ({error.strerror}): name another file."
        ) from error
    if not given:
        line = '{"prompt": "TEXT"}' if kind.is_json else "a prompt"
        raise InputError(f"prompts is {path}, which is empty: put {line} on each line.")
    return given


def _lines(path: pathlib.Path, file: BinaryIO) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of a .txt file as JSON rows; blank ones are skipped."""
    for number, line in enumerate(text_lines(path, file), 1):
        place = f"{path}, line {number}"
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{place} is not UTF-8 ({error}): convert the file.") from error
        if text.strip():
            yield place, {"prompt": text}


def _field(place: str, row: Any) -> str | list[Any]:
    """A row's text, or its messages."""
    if isinstance(row, Broken):
        raise InputError(f"{place} is not JSON ({row.reason}): correct it.")
    fields = row if isinstance(row, dict) else {}
    # Tables written as JSON have null for missing values.
    given = (fields.get(name) for name in ("messages", "prompt", "text"))
    found = next((value for value in given if value is not None), None)
    # JSON allows lone surrogates, which are not characters.
    if isinstance(found, list) or (isinstance(found, str) and not _HALF_A_PAIR.search(found)):
        return found
    raise InputError(
        f'{place} has no text in "prompt" or "text", and no "messages": give each line one of them.'
    )


def _written(
    saved: SavedModel, place: str, messages: list[Any], template: ChatTemplate | None
) -> str:
    """Messages as the model's chat template writes them."""
    if template is None:
        raise InputError(
            f"{place} has messages, and the model {saved.path} has no chat template: give it "
            'prompts, {"prompt": "TEXT"}, or import a model that has one.'
        )
    try:
        return template(messages)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _summary(work: Work, records: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The counts and rates of summary.json, also printed."""
    prefill = work.prompt_tokens / work.prefill_seconds
    decode = work.decoded_tokens / work.decode_seconds if work.decode_seconds else None
    new_tokens = sum(len(record["ids"]) for record in records)
    made = f"{decode:,.0f} generated" if decode else "none generated after the first"
    say(
        f"{len(records)} prompts of {work.prompt_tokens:,} tokens, continued by {new_tokens:,} in "
        f"{seconds:.1f} s; without compiling: {prefill:,.0f} tokens/s read, {made}"
    )
    ended_by = collections.Counter(record["ended_by"] for record in records)
    return {
        "prompts": len(records),
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": new_tokens,
        "ended_by": dict(sorted(ended_by.items())),
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "seconds": seconds,
    }


VERB = Verb(generate)
