"""`salt generate`: what a trained model writes after prompts.

    salt generate --model=out/salt --prompt='Salt is' --prompt='In 1492' --output_dir=out/texts
    salt generate --model=out/salt --prompts=prompts.jsonl --temperature=0.8 --top_p=0.95 \\
        --stop=$'\\n\\n' --max_new_tokens=200 --output_dir=out/texts

Completions are printed as they come, those of the longest prompts first. generations.jsonl holds
them in the order of the prompts: prompt, completion (which ends before a stop text), token ids,
their log-probabilities by the model (before temperature, top-k and top-p; nats), and what ended it:
"end of document", "stop text" or "length".
"""

import json
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

from salt_jax.data.durable_files import write_text
from salt_jax.data.local_copies import local_file
from salt_jax.errors import InputError
from salt_jax.run_folder import RunFolder
from salt_jax.terminal import say
from salt_jax.training import compilation
from salt_jax.training.checkpoints import find_model
from salt_jax.training.config import Devices
from salt_jax.training.generation import Generator, Sampling

GENERATIONS_FILE = "generations.jsonl"


def generate(
    run: RunFolder,
    *,
    model: str,
    step: int | None = None,
    prompt: Sequence[str] = (),
    prompts: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = Sampling.temperature,
    top_k: int = Sampling.top_k,
    top_p: float = Sampling.top_p,
    seed: int = Sampling.seed,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    devices: Devices = Devices(),
) -> None:
    """Continues prompts with a checkpoint.

    Args:
      run: The folder for the results.
      model: The run folder of the model.
      step: The checkpoint; the newest by default.
      prompt: A prompt; the flag may be given again.
      prompts: A file of them instead: .txt, one a line, or .jsonl, in the field "prompt" or "text".
      max_new_tokens: The most tokens that a prompt is continued by.
      temperature: What logits are divided by; 0 always takes the most likely token.
      top_k: Only the k most likely tokens are drawn from; 0 leaves all.
      top_p: Only the smallest set of tokens of at least this probability is drawn from.
      seed: Of the draws.
      stop: A text to end at; the flag may be given again.
      batch_size: Prompts at once.
      devices: The mesh, and where compiled programs are kept.

    Raises:
      InputError: No such model, no prompts or one that is too long, or a setting out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    texts = _texts(prompt, prompts)
    saved = find_model(model, step, "model")
    vocabulary = saved.load_vocabulary()
    device_mesh = devices.mesh.make()
    generator = Generator(
        saved.config, vocabulary, device_mesh, devices.rules, batch_size=batch_size
    )
    ids = vocabulary.encode_many(texts)
    generator.check(ids, max_new_tokens, stop)
    run.begin(replace=True)
    compilation.use_compilation_cache(devices.compilation_cache)
    # Held as it is computed with: reading the parameters is most of what a token costs.
    params = saved.load_params(device_mesh, devices.rules, saved.config.dtype)
    records: list[dict[str, Any]] = [{}] * len(texts)
    start = time.perf_counter()
    completions = generator.stream(params, ids, max_new_tokens, sampling=sampling, stop_texts=stop)
    for completion in completions:
        shown = f"[{completion.index}] {texts[completion.index]}\n→ {completion.text}\n"
        say(*shown.split("\n"))
        records[completion.index] = {
            "prompt": texts[completion.index],
            "completion": completion.text,
            "ids": completion.ids,
            "log_probabilities": completion.log_probabilities,
            "ended_by": completion.ended_by,
        }
    seconds = time.perf_counter() - start
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(run.path / GENERATIONS_FILE, lines)
    _summarize(run, saved.identity, generator, records, seconds)


def _texts(prompt: Sequence[str], prompts: str | None) -> list[str]:
    """The prompts, from the command line or from a file."""
    if bool(prompt) == (prompts is not None):
        raise InputError(
            f"prompt is {tuple(prompt)} and prompts is {prompts}: set one of them, --prompt=TEXT "
            "or --prompts=FILE."
        )
    if prompts is None:
        for text in prompt:
            if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise InputError(f"prompt is {text!r}, which is not UTF-8: change --prompt.")
        return list(prompt)
    path = local_file(prompts)
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"prompts is {prompts!r}: name a .txt file, or a .jsonl one.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(
            f"prompts is {path}, which cannot be read ({error.strerror}): name another file."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"prompts is {path}, which is not UTF-8 ({error}): convert it.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        line = "a prompt" if path.suffix == ".txt" else '{"prompt": "TEXT"}'
        raise InputError(f"prompts is {path}, which is empty: put {line} on each line.")
    if path.suffix == ".txt":
        return [line.removesuffix("\r") for _, line in numbered]
    return [_field(path, number, line) for number, line in numbered]


def _field(path: pathlib.Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number} is not JSON ({error}): correct it.") from error
    fields = record if isinstance(record, dict) else {}
    text = fields.get("prompt", fields.get("text"))
    # JSON can write half of a surrogate pair, which is no character.
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
        raise InputError(
            f'{path}, line {number} has no text in "prompt" or "text": give each line one of them.'
        )
    return text


def _summarize(
    run: RunFolder,
    model: dict[str, Any],
    generator: Generator,
    records: Sequence[dict[str, Any]],
    seconds: float,
) -> None:
    work = generator.work
    prefill = work.prompt_tokens / work.prefill_seconds
    decode = work.decoded_tokens / work.decode_seconds if work.decode_seconds else None
    ended = [record["ended_by"] for record in records]
    new_tokens = sum(len(record["ids"]) for record in records)
    say(
        f"{len(records)} prompts of {work.prompt_tokens:,} tokens, continued by {new_tokens:,} in "
        f"{seconds:.1f} s; without compiling: {prefill:,.0f} tokens/s read, "
        + (f"{decode:,.0f} made" if decode else "none made after the first")
    )
    run.write_summary(
        {
            "model": model,
            "prompts": len(records),
            "prompt_tokens": work.prompt_tokens,
            "new_tokens": new_tokens,
            "ended_by": {reason: ended.count(reason) for reason in sorted(set(ended))},
            "prefill_tokens_per_second": prefill,
            "decode_tokens_per_second": decode,
            "seconds": seconds,
        }
    )
