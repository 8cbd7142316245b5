"""A verb's output folder: its configuration (config.gin), origin (run.json) and results
(summary.json).

A folder that holds a run with another configuration, or that another process is writing, is
refused.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import inspect
import json
import math
import pathlib
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import gin
from salt_jax.errors import InputError
from salt_jax.runtime.processes import Processes
from salt_jax.storage import gin_files
from salt_jax.storage.buckets import is_remote
from salt_jax.storage.durable_files import make_folder, write_text
from salt_jax.storage.run_lock import LOCK_FILE, RunLock

CONFIG_FILE = "config.gin"
RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
FORK_FILE = "fork.json"
CHECKPOINTS_FOLDER = "checkpoints"
# The suffix after the step in Orbax's name of an incomplete checkpoint.
UNFINISHED_CHECKPOINT = ".orbax-checkpoint-tmp"
TENSORBOARD_FOLDER = "tensorboard"
LOGS_FOLDER = "logs"  # of launch/tpu_vm.sh

# `git archive` writes the commit here (.gitattributes).
_ARCHIVED_COMMIT = "$Format:%H$"
_LIBRARIES = [
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "numpy"),
    *("gin-config", "sentencepiece", "tokenizers", "seqio", "tensorflow"),
]
# Verbs whose settings were not grouped in older versions.
_OLD_FORM = re.compile(r"train\.train\.(?!config$)|evaluate\.evaluate\.(cache|tasks)$")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """An output folder and the records in it.

    Attributes:
      path: The folder, on disk or in a bucket (an epath.Path); made by `begin`.
      verb: The verb that writes it ("train").
      config: Returns the operative configuration as text, one setting per line.
      command_line: The command line as typed.
      lock: Locks the folder from `begin` on; None for no lock.
      processes: The processes of the run; only the first writes.
      url: The folder's URL if it is in a bucket, or "".
      send: Uploads the folder to the bucket.
      began: `time.perf_counter()` when the command was started.
    """

    path: pathlib.Path
    verb: str
    config: Callable[[], str] = lambda: ""
    command_line: Sequence[str] = ()
    lock: RunLock | None = None
    processes: Processes = dataclasses.field(default_factory=Processes)
    url: str = ""
    send: Callable[[], None] = lambda: None
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if is_remote(self.path):
            return
        there = next((part for part in (self.path, *self.path.parents) if part.exists()), None)
        if there is not None and not there.is_dir():
            raise InputError(f"{there} is a file: --output_dir must name a folder.")

    def begin(
        self,
        replace: bool = False,
        may_change: Collection[str] = (),
        part: str = "",
        upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> list[str]:
        """Makes the folder and writes config.gin and run.json.

        Args:
          replace: Whether another configuration of the same verb may be overwritten.
          may_change: The settings that may differ from the folder's, by a suffix of their name:
            "train.batch_size" for one, "MeshConfig" for all of a class.
          part: This process's part of the work, if several share the folder.
          upgrade: Renames settings recorded by older versions to today's names.

        Returns:
          The changes, a phrase for each setting ("batch_size was 8 and is now 16"); none with
          `replace`.

        Raises:
          InputError: The folder holds another run, is being written by another process, or cannot
            be written, here or in the bucket; or several workers would share a bucket.
        """
        if part and self.url and not is_remote(self.path):
            raise InputError(
                f"--output_dir={self.url} is not a folder that several workers can share: mount "
                "the bucket (gcsfuse, s3fs) and name the mounted folder."
            )
        config, begun = self.config(), self.begun
        changes = self._changes(replace, may_change, upgrade)
        self.processes.wait("looked")  # before the first one writes
        if self.processes.is_first:
            self._write_origin(config, part)
            try:
                self.send()
            except InputError:
                if not begun:
                    self.withdraw()
                raise
        self.processes.wait("begun")
        self.processes.watch()
        return changes

    def resume(
        self, replace: bool = False, may_change: Collection[str] = (), part: str = ""
    ) -> None:
        """Takes the lock of a folder that holds a run already, before long work comes before
        `begin`, and refuses what that refuses; does nothing in other folders.

        Raises:
          InputError: See `begin`.
        """
        if self.begun:
            self._changes(replace, may_change, dict)
            if self.processes.is_first and self.lock is not None:
                with self._refusing_to_write():
                    self.lock.acquire(self.path, self.verb, part)

    def _write_origin(self, config: str, part: str) -> None:
        with self._refusing_to_write():
            make_folder(self.path)
            if self.lock is not None:
                self.lock.acquire(self.path, self.verb, part)
            write_text(self.path / CONFIG_FILE, config)
            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            origin = {
                "verb": self.verb,
                "command_line": list(self.command_line),
                "versions": library_versions(),
                "git_commit": git_commit(),
                "started": started,
            }
            write_text(self.path / RUN_FILE, to_json(origin, indent=2))

    @contextlib.contextmanager
    def _refusing_to_write(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"The output folder {self.path} cannot be written ({error.strerror}): "
                "choose another --output_dir, or make room."
            ) from error

    @property
    def begun(self) -> bool:
        """Whether the folder already holds a run."""
        return (self.path / RUN_FILE).exists()

    def withdraw(self) -> None:
        """Removes what `begin` wrote, for a run whose input turned out to be bad."""
        for name in (CONFIG_FILE, RUN_FILE):
            (self.path / name).unlink(missing_ok=True)
        if self.lock is not None:
            self.lock.release()
        if not is_remote(self.path) and not any(self.path.iterdir()):
            self.path.rmdir()

    def withdraw_beginning(self) -> None:
        """Calls `withdraw` if this process began the run and has written nothing else."""
        if self.lock is None or not self.lock.is_held or self.processes.count > 1:
            return
        if self.url and not is_remote(self.path):  # a mirror's
            return
        own = {CONFIG_FILE, RUN_FILE, LOCK_FILE, LOGS_FOLDER}
        if {path.name for path in self.path.iterdir()} <= own:
            self.withdraw()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, the verb's results."""
        if self.processes.is_first:
            write_text(self.path / SUMMARY_FILE, to_json(summary, indent=2))

    def require_space(self, needed_bytes: int, purpose: str) -> None:
        """Refuses to start (InputError) if the disk has less than `needed_bytes` free."""
        if is_remote(self.path):
            return
        existing = next(part for part in (self.path, *self.path.parents) if part.exists())
        free_bytes = shutil.disk_usage(existing).free
        if free_bytes < needed_bytes:
            raise InputError(
                f"The disk of {self.path} has {free_bytes / 1e6:,.0f} MB free, and {purpose} "
                f"need {needed_bytes / 1e6:,.0f} MB: choose another --output_dir, or make room."
            )

    def _changes(
        self,
        replace: bool,
        may_change: Collection[str],
        upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> list[str]:
        """How the configuration differs from the folder's; refuses another run."""
        if not self.begun:
            return []
        with self._refusing_damage(RUN_FILE):
            verb = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))["verb"]
        if verb != self.verb:
            raise InputError(
                f"The output folder {self.path} holds a run of `salt {verb}`: "
                f"choose another --output_dir for this `salt {self.verb}`."
            )
        if replace:
            return []
        changes, refused = self.differences(may_change, upgrade)
        if refused:
            more = f" (and {len(refused) - 2} more)" if len(refused) > 2 else ""
            raise InputError(
                f"The output folder {self.path} holds a run with another configuration: "
                f"{'; '.join(refused[:2])}{more}; choose another --output_dir, or go back to "
                f"the settings in its {CONFIG_FILE}."
            )
        return changes

    def differences(
        self,
        may_change: Collection[str],
        upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> tuple[list[str], list[str]]:
        """How this run's settings differ from those in the folder, a phrase for each; see `begin`.

        A setting that an older version did not have is no difference at its default.

        Returns:
          All differences, and those that `may_change` doesn't allow.
        """
        with self._refusing_damage(CONFIG_FILE):
            before = upgrade(_settings((self.path / CONFIG_FILE).read_text(encoding="utf-8")))
        if any(_OLD_FORM.match(name) for name in before):
            raise InputError(
                f"The output folder {self.path} holds a run whose {CONFIG_FILE} is of an older "
                "version of salt_jax, with other setting names: finish it with that version, "
                "or choose another --output_dir; --initial, --teacher and the other verbs take it."
            )
        now, own = _settings(self.config()), f"{self.verb}.{self.verb}."
        changes, unknown = {}, _defaults_alone(now, now.keys() - before.keys())
        for name in sorted((before.keys() | now.keys()) - unknown):
            was, is_now = (
                repr(settings[name]) if name in settings else "unset" for settings in (before, now)
            )
            if was != is_now:
                changes[name] = f"{name.removeprefix(own)} was {was} and is now {is_now}"
        both = [*before.items(), *now.items()]
        refused = [text for name, text in changes.items() if not _may(name, both, may_change)]
        return list(changes.values()), refused

    @contextlib.contextmanager
    def _refusing_damage(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path / name} is damaged: choose another --output_dir, or delete "
                f"{self.path}."
            ) from error


def library_versions() -> dict[str, str]:
    """The versions of Python, this package and the libraries that results depend on."""
    from salt_jax import __version__

    versions = {"python": platform.python_version(), "salt_jax": __version__}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def git_commit() -> str | None:
    """The commit of this package ("…-dirty" with local changes), None if unknown."""
    package = pathlib.Path(__file__).resolve().parent.parent
    if not (package.parent / ".git").exists():
        return None if _ARCHIVED_COMMIT.startswith("$") else _ARCHIVED_COMMIT

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        result = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    return commit + "-dirty" * bool(git("status", "--porcelain")) if commit else None


def _settings(config: str) -> dict[str, Any]:
    """The settings in a configuration's text, by name."""
    bindings = gin_files.bindings_in(gin_files.statements_in(config))
    return {name: binding.value for name, binding in bindings}


def _defaults_alone(settings: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """Those of the names that are at their default, and the macros that only such settings use."""
    found = set()
    for name in names:
        owner, _, argument = name.rpartition(".")
        value = settings[name]
        macro = next((one.macro for one in gin_files.references_in(value)), "")
        value = settings.get(macro, value) if macro in names else value
        try:
            made = gin.get_configurable(owner)
        except ValueError:  # there is none: a macro, or another version's
            continue
        if isinstance(made, type):  # gin's own subclass takes any arguments
            made = next(one for one in made.__mro__ if "__init__" in vars(one))
        parameters = inspect.signature(made).parameters
        if argument in parameters and repr(parameters[argument].default) == repr(value):
            found |= {name, macro} - {""}
    used_elsewhere = {
        one.macro
        for name, value in settings.items()
        if name not in found
        for one in gin_files.references_in(value)
    }
    return found - used_elsewhere


def _may(name: str, settings: Sequence[tuple[str, Any]], may_change: Collection[str]) -> bool:
    """Whether a setting may change; a macro may if all settings that use it may."""
    if "." in name:
        return any(f".{allowed}." in f".{name}." for allowed in may_change)
    users = [
        user
        for user, value in settings
        if any(one.macro == name for one in gin_files.references_in(value))
    ]
    return bool(users) and all(_may(user, settings, may_change) for user in users)


def to_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON text with NaN and infinities as null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
