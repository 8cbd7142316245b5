"""Downloads from a server on this machine that speaks the Hub's protocol."""

import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from salt_jax.errors import InputError
from salt_jax.huggingface.hub import download, split_name
from tests.hub_server import COMMIT, Hub, constants, serving

WEIGHTS = bytes(range(256)) * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b'{"version": "1.0"}',
    "generation_config.json": b"{}",
    "additional_chat_templates/tools.jinja": b"{{ messages }}",
    "README.md": b"#",
    "pytorch_model.bin": WEIGHTS,
    "consolidated.safetensors": WEIGHTS,
    "original/params.json": b"{}",
    "onnx/model.safetensors": WEIGHTS,
}
WANTED = {*FILES} - {"README.md", "pytorch_model.bin", "consolidated.safetensors"}
WANTED -= {"original/params.json", "onnx/model.safetensors"}


@pytest.fixture
def hub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with serving({"owner/small": folder}, tmp_path, monkeypatch) as hub:
        yield hub


def names(folder: pathlib.Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_only_what_conversion_reads_is_downloaded_and_only_once(hub: Hub) -> None:
    folder = download("owner/small", "step3")
    assert names(folder) == WANTED
    assert folder.name == COMMIT
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    hub.asked.clear()
    assert download("owner/small", "step3") == folder
    assert not hub.requests_for("model.safetensors")


def test_a_broken_connection_is_resumed_where_it_broke(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut = 1
    assert (download("owner/small") / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [byte for method, byte in hub.requests_for("model.safetensors") if method == "GET"]
    assert "bytes=5000-" in ranges


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_named(hub: Hub, name: str) -> None:
    hub.corrupt = name
    with pytest.raises(InputError, match=rf"{name} is damaged.*delete .*blobs"):
        download("owner/small")


def test_a_gated_repository_wants_a_token_which_is_not_shown(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.gated.add("owner/small")
    for token in ("", "hf_of_another"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(InputError, match=r"is gated: accept its terms .*hf auth login") as said:
            download("owner/small")
        assert not token or token not in str(said.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert names(download("owner/small")) == WANTED
    assert hub.tokens == {"Bearer hf_of_another", "Bearer hf_secret"}
    assert not re.search("hf_secret|hf_of_another", "".join(capfd.readouterr()))


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("owner/other", None, "shows you no model owner/other: correct the name"),
        ("owner/small", "v9", "no revision v9: change --revision, or what follows the @."),
    ],
)
def test_what_is_not_there(hub: Hub, name: str, revision: str | None, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        download(name, revision)


def test_what_a_hub_answers_instead_of_a_file_is_told(hub: Hub) -> None:
    hub.refuses = True
    with pytest.raises(InputError, match=r"small could not be downloaded, http.* answers 403: run"):
        download("owner/small")


def test_pickles_are_told_of_and_not_downloaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub.repositories["owner/small"] / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"owner/small has pytorch_model\.bin, a pickle"):
        download("owner/small")
    assert not hub.requests_for("pytorch_model.bin")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"owner/small is not in the cache.*HF_HUB_OFFLINE"):
        download("owner/small")


def test_without_the_hub_the_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download("owner/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert download("owner/small") == folder
    assert not hub.asked
    with pytest.raises(InputError, match=r"owner/other is not in the cache.*HF_HUB_OFFLINE"):
        download("owner/other")


def test_a_cache_that_cannot_be_made_is_named(
    hub: Hub, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(InputError, match=r"file/hub \(Not a directory\): .*set HF_HOME"):
        download("owner/small")


def test_names_with_a_revision() -> None:
    assert split_name("hf:EleutherAI/pythia-1.4b@step18000") == (
        "EleutherAI/pythia-1.4b",
        "step18000",
    )
    assert split_name("hf://owner/name") == ("owner/name", None)
    assert split_name("runs/slm") is None
    with pytest.raises(InputError, match="write hf:OWNER/NAME"):
        split_name("hf:name")


def test_it_is_imported_only_when_it_downloads() -> None:
    code = "import sys, salt_jax.huggingface.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
