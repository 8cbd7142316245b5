"""Folders of users who have no home, or one that they can't write."""

import os
import pathlib
from collections.abc import Iterator

import pytest

from salt_jax.errors import InputError
from salt_jax.storage import local_copies
from salt_jax.storage.user_folders import cache_folder, writable


@pytest.fixture
def no_home(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """An unknown user without HOME; the folder for temporary files."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache_folder.cache_clear()
    yield tmp_path
    cache_folder.cache_clear()


def test_without_a_home_there_is_a_temporary_folder_which_is_said_once(
    no_home: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="no home folder"):
        writable("~/x")
    monkeypatch.delenv(local_copies.COPIES, raising=False)
    own = no_home / f"salt_jax-{os.getuid()}"
    for _ in range(2):
        copies = local_copies.copies_folder()
    assert copies == own / "salt_jax"
    assert copies.is_dir()
    assert own.stat().st_mode & 0o777 == 0o700
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{copies} is used; set SALT_LOCAL_COPIES" in error


def test_a_temporary_folder_of_someone_else_s_is_not_used(
    no_home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (no_home / "elsewhere").mkdir()
    (no_home / f"salt_jax-{os.getuid()}").symlink_to(no_home / "elsewhere")
    with pytest.raises(InputError, match="is another user's: set HF_HOME"):
        cache_folder("huggingface", "HF_HOME")


def test_a_folder_that_was_set_and_cannot_be_written_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        monkeypatch.setenv(local_copies.COPIES, str(tmp_path / name))
        with pytest.raises(InputError, match=r"SALT_LOCAL_COPIES is .*file.* cannot be written"):
            local_copies.copies_folder()
    monkeypatch.setenv(local_copies.COPIES, str(tmp_path / "new" / "folder"))
    assert local_copies.copies_folder().is_dir()
