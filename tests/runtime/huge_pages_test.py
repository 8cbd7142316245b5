"""The `salt` command's memory is in huge pages, unless the user has set otherwise."""

import os
import pathlib
import subprocess
import sys

import pytest

ENABLED = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
STARTING = """
import pathlib, sys
import salt_jax.__main__ as m, salt_jax.main as n
def main():
    block = bytearray(64 << 20)
    memory = pathlib.Path("/proc/self/smaps_rollup").read_text()
    return print(sys.argv, "AnonHugePages:         0 kB" not in memory)
n.main = main
m.run()
"""


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="no huge pages are to be had"
)
@pytest.mark.parametrize(("user", "huge"), [({}, True), ({"GLIBC_TUNABLES": ""}, False)])
def test_memory_is_in_huge_pages_and_arguments_are_kept(user: dict[str, str], huge: bool) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-P", "-c", STARTING, "train", "--gin.NAME='a b'"]
    told = subprocess.run(command, env=environment | user, capture_output=True, text=True)
    huge |= "[always]" in ENABLED.read_text()
    assert told.stdout == f"['-c', 'train', \"--gin.NAME='a b'\"] {huge}\n", told.stderr
