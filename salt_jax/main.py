"""The `salt` command: `salt VERB --gin_file=A --gin.NAME=value --output_dir=PATH`.

Calls one verb of `salt_jax.commands` with its gin settings. Exit codes: 0 finished, 1 the run
failed, 2 bad input, 75 interrupted and saved (run the same command again).
"""

import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import gin
from salt_jax import __version__
from salt_jax.cli.command_line import (
    SAFE_GIN,
    USAGE,
    Arguments,
    parse_arguments,
    require_known,
    verb_help,
    verb_table,
    verbs,
)
from salt_jax.cli.configuration import configure, settings_of_all
from salt_jax.cli.verb import load_verb
from salt_jax.cli.verb_process import run_guarded
from salt_jax.errors import INTERRUPTED, InputError, Interrupted, RunFailed, visible
from salt_jax.runtime import output_streams, processes
from salt_jax.storage.buckets import is_remote, path_of
from salt_jax.storage.mirror import Mirror
from salt_jax.storage.run_folder import RunFolder, library_versions
from salt_jax.storage.run_lock import RunLock
from salt_jax.terminal import say, warn


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except InputError as error:
        warn(_sentence(error))
        return 2
    except RunFailed as error:
        warn(_sentence(error))
        return 1
    except Interrupted as error:
        warn(_sentence(error))
        return INTERRUPTED
    except OSError as error:
        raised = _as_raised(error)
        name = raised.filename or "--output_dir"
        if raised.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            cannot = "be written", "make room, or choose another --output_dir"
        elif raised.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP):
            cannot = "be opened", "name another file or folder, or change its permissions"
        else:
            raise
        warn(f"{name} cannot {cannot[0]} ({raised.strerror}): {cannot[1]}.")
        return 2


def _run(argv: list[str]) -> int:
    began = time.perf_counter()
    if not any(argument.startswith("--output_dir") for argument in argv):
        output_streams.print_only()
    if argv and argv[0] == "--version":
        say(f"salt_jax {__version__}")
        return 0
    if not argv or argv[0] in ("--help", "-h", "help"):
        say(*f"{USAGE}\nverbs:\n{verb_table()}".splitlines())
        return 0 if argv else 2
    arguments = parse_arguments(argv)
    require_known("verb", arguments.verb, verbs())
    if arguments.help:
        say(*verb_help(arguments.verb).splitlines())
        return 0
    if not arguments.output_dir and not _prints_only(arguments):
        raise InputError("No output folder was given: add --output_dir=FOLDER.")
    several = processes.are_several(arguments.processes)
    if several and processes.GUARDED not in os.environ:
        return _run_guarded(argv)
    if arguments.safe_gin:
        os.environ[SAFE_GIN] = "1"
    verb, writes = configure(arguments), load_verb(arguments.verb).writes_to_buckets
    if several and writes and arguments.output_dir.startswith("s3://"):
        raise InputError(
            f"--output_dir={arguments.output_dir}: each process of `salt {arguments.verb}` writes "
            "a part, which it can't to s3:// (Orbax, which writes checkpoints, has no S3): name a "
            "folder in gs://, or mount the bucket (s3fs)."
        )
    _quiet_libtpu()
    together = _join(arguments)
    if together.count > 1:
        versions = library_versions()
        together.require_same(
            versions=str([versions.get(name) for name in ("salt_jax", "jax", "jaxlib")]),
            settings=f"{arguments.verb} {settings_of_all()}",
        )
    with RunLock() as lock, contextlib.ExitStack() as stack:
        mirror = _mirrored(arguments, together, stack)
        folder = RunFolder(
            path=mirror.path if mirror else path_of(arguments.output_dir),
            url=arguments.output_dir if is_remote(arguments.output_dir) else "",
            send=mirror.send if mirror else lambda: None,
            verb=arguments.verb,
            config=gin.operative_config_str,
            command_line=["salt", *argv],
            lock=lock,
            processes=together,
            began=began,
        )
        begun = folder.begun
        try:
            verb(folder)
        except BaseException as error:
            if isinstance(error, InputError) and not begun:
                folder.withdraw_beginning()
            if not isinstance(error, InputError | RunFailed | Interrupted):
                together.wait_for_missing()
            together.end(str(error).partition("\n")[0] or type(error).__name__)
            # jax raises a plain RuntimeError for this
            if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
                raise RunFailed(_out_of_memory(arguments.verb, str(error))) from error
            raise
        together.end()
    return 0


def check(file: TextIO) -> int:
    """Configures commands, {NAME: [VERB, FLAG, …]} as JSON, without running them.

    Writes the name and error of the first wrong one to stderr; returns the exit code.
    """
    earlier: dict[str, dict[str, Any]] = {}
    for name, argv in json.load(file).items():
        arguments = parse_arguments(argv)
        try:
            configure(arguments)
            verb = load_verb(arguments.verb)
            if verb.check is not None:
                settings = gin.get_bindings(verb.function)
                verb.check(settings, earlier)
                earlier[arguments.output_dir] = settings
        except InputError as error:
            print(f"{name}: {_sentence(error)}", file=sys.stderr)
            return 2
    return 0


def _run_guarded(argv: list[str]) -> int:
    """Runs one of several processes as a child, since jax aborts it if process 0 dies."""
    code, host = run_guarded(argv)
    if code == -signal.SIGABRT:
        raise Interrupted(
            f"process 0 on {host or 'an unknown host'}, the coordinator, has gone missing, or "
            "the network to it: run the same command on every host again to resume."
        )
    return code if code >= 0 else 1


def _prints_only(arguments: Arguments) -> bool:
    """Whether the verb only prints (a list of tasks, say), and so needs no output folder."""
    typed = arguments.settings.get(load_verb(arguments.verb).print_flag, [])
    return typed[-1:] in (["True"], ["true"])


def _join(arguments: Arguments) -> processes.Processes:
    """Joins the other processes of the run, if any; only the first prints."""
    verb = load_verb(arguments.verb)
    together = processes.join(arguments.processes, verb.saves_on_request)
    if together.count > 1 and not verb.several_processes:
        raise InputError(
            f"`salt {arguments.verb}` runs in one process and this is one of {together.count}: "
            "leave out --coordinator_address, --process_count, --process_index, --multi_process."
        )
    if not together.is_first:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
    return together


def _mirrored(
    arguments: Arguments, together: processes.Processes, stack: contextlib.ExitStack
) -> Mirror | None:
    """Mirrors the output to a bucket, unless the verb itself writes there. Of several processes
    only the first has any: the others read the bucket's."""
    url, mirror, refusal = arguments.output_dir, None, ""
    is_direct = url.startswith("gs://") and load_verb(arguments.verb).writes_to_buckets
    if not is_remote(url) or is_direct:
        return None
    try:
        if together.is_first:
            mirror = stack.enter_context(Mirror(url, arguments.verb))
    except InputError as error:
        if together.count == 1:
            raise
        refusal = str(error)
    if together.count > 1:
        processes.raise_together(refusal)
    return mirror


def _out_of_memory(verb: str, message: str) -> str:
    reason = message.partition("RESOURCE_EXHAUSTED: ")[2].partition("\n")[0].rstrip(".")
    smaller = "raise --microbatches" if verb == "train" else "lower --batch_size"
    return (
        f"The devices' memory is too small for this run ({reason}): "
        f"{smaller}, lower chunk_tokens, or use more devices; `salt plan` says what fits."
    )


def _quiet_libtpu() -> None:
    """Keeps libtpu, installed on a machine without a TPU, from querying the metadata server."""
    # JAX sets TPU_SKIP_MDS_QUERY if it finds no TPU.
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _as_raised(error: OSError) -> OSError:
    """The original of an OSError that gin has re-raised without its errno and file name."""
    while error.errno is None and isinstance(error.__context__, OSError):
        error = error.__context__
    return error


def _sentence(error: Exception) -> str:
    """An error's text on one line, without the call stack that gin appends."""
    return visible(str(error).partition("\n  In call to configurable")[0])
