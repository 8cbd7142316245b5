"""Transparent huge pages for what the C library allocates."""

import os
import sys

_VARIABLE = "GLIBC_TUNABLES"


def use_huge_pages() -> None:
    """Starts this process again, as the same one, with glibc asking for huge pages.

    On a CPU every step allocates its arrays anew, and the kernel clears their memory, page by page:
    in pages of 4 KiB a third of a small model's time. glibc reads the setting only at a process's
    start; without glibc 2.35 or transparent huge pages it does nothing. Whoever has set
    GLIBC_TUNABLES, even to nothing, keeps what was set.
    """
    if sys.platform == "linux" and sys.executable and _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
