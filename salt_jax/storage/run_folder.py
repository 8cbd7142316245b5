"""The folder a verb writes into: its configuration, where it came from, and its results.

In: the output folder, the verb, the command line and a function that gives the operative
configuration.
Out: config.gin, run.json and summary.json. A folder that holds another run's configuration is
refused, and so is one that another process is writing.
"""

import dataclasses
import datetime
import errno
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from salt_jax.errors import InputError
from salt_jax.runtime.processes import Processes
from salt_jax.storage import gin_files
from salt_jax.storage.run_lock import LOCK_FILE, RunLock

CONFIG_FILE = "config.gin"
RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
TENSORBOARD_FOLDER = "tensorboard"

# `git archive` writes the commit here (.gitattributes): its copies know where they come from.
_ARCHIVED_COMMIT = "$Format:%H$"
_LIBRARIES = [
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array-record",
    "numpy",
    "gin-config",
    "sentencepiece",
    "tokenizers",
    "seqio",
    "tensorflow",
]


# Before the settings of these verbs were grouped each was one of the verb's own.
_OLD_FORM = re.compile(r"train\.train\.(?!config$)|evaluate\.evaluate\.(cache|tasks)$")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """An output folder and what is to be recorded in it.

    Attributes:
      path: The folder; made by `begin`.
      verb: The verb that writes it ("train").
      config: Gives the operative configuration as text, one setting a line.
      command_line: What was typed.
      lock: Keeps other processes out from `begin` on; None lets them in.
      processes: Those that run it; the first of them writes.
      url: Where a copy of it is kept in a bucket; "" where none is.
      send: Sends what is in the folder there.
    """

    path: pathlib.Path
    verb: str
    config: Callable[[], str] = lambda: ""
    command_line: Sequence[str] = ()
    lock: RunLock | None = None
    processes: Processes = dataclasses.field(default_factory=Processes)
    url: str = ""
    send: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
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
          replace: Whether a folder with another configuration of the same verb may be written over.
          may_change: The settings that may differ from the folder's all the same, each by the last
            parts of its name: "train.batch_size" for one, "MeshConfig" for all of a class. A verb
            lists those that change no result of its as CHANGES_NO_RESULT.
          part: Which part of the work this process does, where several may share the folder.
          upgrade: Gives the folder's settings, which an older version may have recorded, the names
            of today.

        Returns:
          What did change, a phrase for each setting ("batch_size was 8 and is now 16"); nothing
          with `replace`.

        Raises:
          InputError: The folder holds another run, another process writes it, or it cannot be
            written, here or in the bucket; or a part of the work has no folder that all share.
        """
        if part and self.url:
            raise InputError(
                f"--output_dir={self.url} is no folder that several workers share: mount the "
                "bucket (gcsfuse, s3fs) and name the mounted folder."
            )
        config, begun = self.config(), self.begun
        changes = self._changes(config, replace, may_change, upgrade)
        self.processes.wait("looked")  # all have, before the first one writes
        if self.processes.is_first:
            self._write_origin(config, part)
            try:
                self.send()
            except InputError:
                if not begun:
                    self.withdraw()
                raise
        self.processes.wait("begun")
        self.processes.watch(self.path)
        return changes

    def _write_origin(self, config: str, part: str) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.lock is not None:
                self.lock.acquire(self.path, self.verb, part)
            write_atomically(self.path / CONFIG_FILE, config)
            write_atomically(self.path / RUN_FILE, to_json(self._origin(), indent=2))
        except OSError as error:
            raise InputError(
                f"The output folder {self.path} cannot be written ({error.strerror}): "
                "choose another --output_dir, or make room."
            ) from error

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run already."""
        return (self.path / RUN_FILE).exists()

    def withdraw(self) -> None:
        """Takes back what `begin` wrote, for a run whose input turned out bad."""
        for name in (CONFIG_FILE, RUN_FILE):
            (self.path / name).unlink(missing_ok=True)
        if self.lock is not None:
            self.lock.release()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def withdraw_beginning(self) -> None:
        """`withdraw`, where this process has begun and there is nothing else yet."""
        if self.lock is None or not self.lock.is_held or self.url or self.processes.count > 1:
            return
        if {path.name for path in self.path.iterdir()} <= {CONFIG_FILE, RUN_FILE, LOCK_FILE}:
            self.withdraw()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, the verb's results."""
        if self.processes.is_first:
            write_atomically(self.path / SUMMARY_FILE, to_json(summary, indent=2))

    def require_space(self, needed_bytes: int, purpose: str) -> None:
        """Refuses to start when the disk has less than `needed_bytes` free.

        Raises:
          InputError: Too little space, with both figures.
        """
        folder = self.path
        while not folder.exists():
            folder = folder.parent
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < needed_bytes:
            raise InputError(
                f"The disk of {self.path} has {free_bytes / 1e6:,.0f} MB free, and {purpose} "
                f"need {needed_bytes / 1e6:,.0f} MB: choose another --output_dir, or make room."
            )

    def _changes(
        self,
        config: str,
        replace: bool,
        may_change: Collection[str],
        upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> list[str]:
        """How the configuration differs from the folder's; refuses another run."""
        run_file = self.path / RUN_FILE
        if not run_file.exists():
            return []
        try:
            verb = json.loads(run_file.read_text(encoding="utf-8"))["verb"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{run_file} is damaged: choose another --output_dir, or delete {self.path}."
            ) from error
        if verb != self.verb:
            raise InputError(
                f"The output folder {self.path} holds a run of `salt {verb}`: "
                f"choose another --output_dir for this `salt {self.verb}`."
            )
        if replace:
            return []
        try:
            before = upgrade(_settings((self.path / CONFIG_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path / CONFIG_FILE} is damaged: choose another --output_dir, or delete "
                f"{self.path}."
            ) from error
        if any(_OLD_FORM.match(name) for name in before):
            raise InputError(
                f"The output folder {self.path} holds a run whose {CONFIG_FILE} is of an older "
                "version of salt_jax, with other names of settings: finish it with that version, "
                "or choose another --output_dir; --initial, --teacher and the other verbs take it."
            )
        now, own = _settings(config), f"{self.verb}.{self.verb}."
        changes = {
            name: f"{name.removeprefix(own)} was {_shown(before, name)} and is now "
            f"{_shown(now, name)}"
            for name in sorted(before.keys() | now.keys())
            if _shown(before, name) != _shown(now, name)
        }
        both = [*before.items(), *now.items()]
        differences = [text for name, text in changes.items() if not _may(name, both, may_change)]
        if differences:
            more = f" (and {len(differences) - 2} more)" if len(differences) > 2 else ""
            raise InputError(
                f"The output folder {self.path} holds a run with another configuration: "
                f"{'; '.join(differences[:2])}{more}; choose another --output_dir, or go back to "
                f"the settings in its {CONFIG_FILE}."
            )
        return list(changes.values())

    def _origin(self) -> dict[str, Any]:
        return {
            "verb": self.verb,
            "command_line": list(self.command_line),
            "versions": library_versions(),
            "git_commit": git_commit(),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old text or the new, never a part."""
    # A name of its own: several processes of one command may write into one folder.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise OSError(error.errno, "no space left on the disk", str(path)) from error
        raise


def library_versions() -> dict[str, str]:
    """The versions of Python, of this package and of the libraries its results depend on."""
    from salt_jax import __version__

    versions = {"python": platform.python_version(), "salt_jax": __version__}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit that this package comes from ("…-dirty" when changed), None if unknown."""
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
    if not commit:
        return None
    return commit + ("-dirty" if git("status", "--porcelain") else "")


def _settings(config: str) -> dict[str, Any]:
    """Settings by name from a configuration's text."""
    bindings = gin_files.bindings_in(gin_files.statements_in(config))
    return {name: binding.value for name, binding in bindings}


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "unset"


def _may(name: str, settings: Sequence[tuple[str, Any]], may_change: Collection[str]) -> bool:
    """Whether a setting may change; a macro may if all that it is given to may."""
    if "." in name:
        return any(f".{allowed}." in f".{name}." for allowed in may_change)
    users = [
        user
        for user, value in settings
        if any(one.macro == name for one in gin_files.references_in(value))
    ]
    return bool(users) and all(_may(user, settings, may_change) for user in users)


def to_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON text; what JSON has no word for, NaN and the infinities, is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
