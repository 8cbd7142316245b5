"""The `salt` command's memory is in huge pages, unless the user has set otherwise."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

ENABLED = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
STARTED = """
import os, pathlib, sys
import salt_jax.__main__ as m, salt_jax.main as n
def main():
    block = bytearray(64 << 20)
    memory = pathlib.Path("/proc/self/smaps_rollup").read_text()
    return print(sys.argv[1:], "AnonHugePages:         0 kB" not in memory)
n.main = main
m.run()
"""

ALONE = ["-P", "salt"]
pytestmark = pytest.mark.skipif(
    not ENABLED.exists()
    or "[madvise]" not in ENABLED.read_text()
    or platform.libc_ver()[0] != "glibc"
    or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35),
    reason="glibc 2.35 and huge pages for those that ask are not there",
)


@pytest.mark.parametrize(
    ("start", "user", "huge"),
    [
        (ALONE, {}, True),
        (ALONE, {"GLIBC_TUNABLES": ""}, False),
        (ALONE, {"SALT_HUGE_PAGES": "1"}, False),  # a loader that takes GLIBC_TUNABLES away
        (["host.py"], {}, False),
        (["-m", "trace", "--count", "--missing", "--coverdir=counts", "salt"], {}, False),
        (["-"], {}, False),
    ],
)
def test_memory_is_in_huge_pages_and_arguments_are_kept(
    start: list[str], user: dict[str, str], huge: bool, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "salt").write_text(STARTED, encoding="utf-8")
    host = f"import runpy, sys\nsys.argv[0] = {str(tmp_path / 'salt')!r}\nrunpy.run_path('salt')\n"
    (tmp_path / "host.py").write_text(host, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in {"GLIBC_TUNABLES", *user}}
    environment.pop("SALT_HUGE_PAGES", None)
    told = subprocess.run(
        [sys.executable, *start, "train", "--gin.NAME='a b'"],
        cwd=tmp_path,
        env=environment | user,
        input=STARTED,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.stdout.startswith(f"['train', \"--gin.NAME='a b'\"] {huge}\n"), told.stderr
    assert told.stdout.count("gin.NAME") == 1
