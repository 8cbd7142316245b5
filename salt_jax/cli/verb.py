"""A verb's entry for the command line: its function and how to run it."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from salt_jax.errors import needed_libraries


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb; its module in `salt_jax.commands` defines it as VERB.

    Attributes:
      function: Takes a RunFolder, and its settings as keyword arguments.
      positional: The setting that arguments without a flag set.
      print_flag: A flag with which it only prints, and needs no output folder.
      several_processes: Whether it may run as one of several processes.
      saves_on_request: Whether all processes save when one is asked to stop.
      changes_no_result: Settings that change results by rounding at most ("Devices.mesh").
      gin_files: For messages: a gin file that sets what no flag can, by setting.
      writes_to_buckets: Whether it writes gs:// itself, from every process; other output in buckets
        is mirrored.
      not_needed: Values for settings that gin files may leave REQUIRED ("Data.cache").
      check: Takes the settings of a command that a study will run, and those of its commands of
        this verb before it, by output folder; raises InputError where they don't fit.
    """

    function: Callable[..., None]
    positional: str = ""
    print_flag: str = ""
    several_processes: bool = False
    saves_on_request: bool = False
    writes_to_buckets: bool = False
    changes_no_result: tuple[str, ...] = ()
    gin_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    not_needed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    check: Callable[[Mapping[str, Any], Mapping[str, Mapping[str, Any]]], None] | None = None


def load_verb(name: str) -> Verb:
    """The verb of that name; InputError if a library that it needs is not installed."""
    with needed_libraries(f"`salt {name}`", "prepare"):
        verb: Verb = importlib.import_module(f"salt_jax.commands.{name}").VERB
    return verb
