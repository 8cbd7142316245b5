"""The exceptions that main.py turns into a message and an exit code, and helpers for messages."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping

# Exit code: run the same command again.
INTERRUPTED = 75


class InputError(ValueError):
    """Bad input or a bad setting: what was got, what was expected, what to change. Exit code 2."""


class RunFailed(RuntimeError):  # noqa: N818 (says what happened, as KeyboardInterrupt does)
    """The run itself failed (too many non-finite updates, say): exit code 1."""


class Interrupted(RuntimeError):  # noqa: N818
    """The run was asked to stop and has saved its state: exit code 75, start it again."""


def nearest(name: str, known: Iterable[str], shown: Mapping[str, str] | None = None) -> str:
    """ " (nearest: …)" if a known name is like `name`, else ""; `shown` maps it to what to show."""
    for match in difflib.get_close_matches(name, list(known), n=1, cutoff=0.5):
        return f" (nearest: {match if shown is None else shown[match]})"
    return ""


@contextlib.contextmanager
def needed_libraries(user: str, extra: str) -> Iterator[None]:
    """Turns the ImportError of a library of an extra, which `user` needs, into an InputError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).startswith("salt_jax"):
            raise
        raise InputError(
            f"{user} needs the library {error.name}, which is not installed: "
            f"pip install 'salt_jax[{extra}]'."
        ) from error


def visible(text: str, kept: str = "") -> str:
    """Untrusted text for a terminal, with control characters and line ends escaped."""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def require_counts(at_least: int = 1, **settings: int | None) -> None:
    """Raises InputError for a setting below a minimum or beyond int32; None passes."""
    for name, value in settings.items():
        if value is not None and value < at_least:
            raise InputError(f"{name} is {value} and must be at least {at_least}: change --{name}.")
        if value is not None and value >= 2**31:
            raise InputError(f"{name} is {value} and must be below 2³¹: change --{name}.")
