"""Transparent huge pages for what the C library allocates."""

import contextlib
import os
import pathlib
import sys

_VARIABLE = "GLIBC_TUNABLES"
_TRIED = "SALT_HUGE_PAGES"  # a loader may take the other away, and the process start itself forever


def use_huge_pages() -> None:
    """Starts this process again, as the same one, with glibc asking for huge pages.

    On a CPU every step allocates its arrays anew, and the kernel clears their memory, page by page:
    in pages of 4 KiB a third of a small model's time. glibc reads the setting only at a process's
    start; without glibc 2.35 or transparent huge pages it does nothing. Whoever has set
    GLIBC_TUNABLES, even to nothing, keeps what was set.
    """
    if sys.platform != "linux" or {_VARIABLE, _TRIED} & {*os.environ} or not _is_started_alone():
        return
    if os.sysconf("SC_PAGE_SIZE") == 4096:  # with larger ones a huge page has up to 512 MiB
        os.environ |= {_VARIABLE: "glibc.malloc.hugetlb=1", _TRIED: "1"}
        with contextlib.suppress(OSError):
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_started_alone() -> bool:
    """Whether Python was started for `salt`, not for a debugger or a program that calls it."""
    given = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv[1:])]
    is_module = given[-2:] == ["-m", "salt_jax"]
    options = given[: -2 if is_module else -1]
    return (
        (is_module or given[-1:] == sys.argv[:1] != ["-"])
        and all(option.startswith("-") for option in options)
        and pathlib.Path(sys.executable).name.startswith("python")
    )
