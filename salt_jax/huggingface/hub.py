"""Downloads a model from the Hugging Face Hub: its safetensors, tokenizer and configuration.

`huggingface_hub` resumes downloads, uses the shared cache (HF_HOME), and reads the token,
HF_ENDPOINT and HF_HUB_OFFLINE as usual.
"""

import functools
import hashlib
import pathlib
import re
import sys
from typing import TYPE_CHECKING

from salt_jax.errors import InputError
from salt_jax.huggingface.model_folders import other_formats, repository_id

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hf:"
_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
# Subfolders hold other libraries' files, except additional_chat_templates/NAME.jinja.
_NOT_FILES = ("*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt", "consolidated*.safetensors")


def split_name(name: str) -> tuple[str, str | None] | None:
    """Repository and revision of "hf:OWNER/NAME@REVISION", None without "hf:"; InputError if it is
    malformed."""
    if not name.startswith(PREFIX):
        return None
    repository, _, revision = name.removeprefix(PREFIX).removeprefix("//").partition("@")
    if repository_id(repository) != repository:
        raise InputError(
            f"{name!r} is not the name of a repository: write {PREFIX}OWNER/NAME, or "
            f"{PREFIX}OWNER/NAME@REVISION."
        )
    return repository, revision or None


def download(repository: str, revision: str | None = None) -> pathlib.Path:
    """Downloads the files of a model that conversion reads, unless they are cached.

    Args:
      repository: "EleutherAI/pythia-1.4b".
      revision: A branch, tag or commit; "main" by default.

    Returns:
      The snapshot's folder in huggingface_hub's cache, named by the commit.

    Raises:
      InputError: huggingface_hub is not installed, the Hub refuses or is unreachable, there is no
        such repository or revision, it has no safetensors, a file's digest is wrong, or the cache
        cannot be written.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
        from huggingface_hub.utils import disable_progress_bars
    except ModuleNotFoundError as error:
        raise InputError(
            f"{repository} is not a folder here, and downloading it needs huggingface_hub: "
            "pip install 'salt_jax[hub]', or name a folder that exists."
        ) from error
    at = f"{repository}@{revision}" if revision else repository
    api = huggingface_hub.HfApi(library_name="salt_jax")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = api.snapshot_download(
            repository, revision=revision, allow_patterns=[*_FILES], ignore_patterns=[*_NOT_FILES]
        )
        _require_safetensors(api, repository, pathlib.Path(folder))
    except errors.GatedRepoError as error:
        raise InputError(
            f"{at} is gated: accept its terms at {api.endpoint}/{repository}, and log in with "
            "`hf auth login` (or set HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{repository} has no revision {revision}: change --revision, or what follows the @."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{api.endpoint} shows you no model {repository}: correct the name, or, if it is "
            "private, log in with `hf auth login` (or set HF_TOKEN)."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise InputError(
            f"{at} is not in the cache, and {api.endpoint} is out of reach or HF_HUB_OFFLINE is "
            "set: connect, or name a folder that exists."
        ) from error
    except errors.HTTPError as error:  # also the base of httpx's errors
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"answers {status}" if status else "ended the connection"
        raise InputError(
            f"{at} could not be downloaded, {api.endpoint} {reason}: run the same command again, "
            "which resumes."
        ) from error
    except OSError as error:
        raise InputError(
            f"{at} could not be kept in {huggingface_hub.constants.HF_HUB_CACHE} "
            f"({error.strerror or error}): make room there, or set HF_HOME to another folder."
        ) from error
    _require_digests(pathlib.Path(folder))
    return pathlib.Path(folder)


def _require_safetensors(api: "HfApi", repository: str, folder: pathlib.Path) -> None:
    if not any(folder.glob("*.safetensors")):
        names = map(pathlib.Path, api.list_repo_files(repository, revision=folder.name))
        advice = other_formats(sorted(name for name in names if len(name.parts) == 1))
        raise InputError(f"{repository} has {advice or 'no safetensors: name another model'}.")


def _require_digests(folder: pathlib.Path) -> None:
    """Compares files with the digests that are their names in the cache, SHA-256 or git's SHA-1."""
    for file in sorted(folder.iterdir()):
        blob = file.resolve()
        if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            continue  # a file system without links
        header = b"blob %d\0" % blob.stat().st_size
        of_git = functools.partial(hashlib.sha1, header, usedforsecurity=False)
        with blob.open("rb") as opened:
            digest = hashlib.file_digest(opened, of_git if len(blob.name) == 40 else "sha256")
        if digest.hexdigest() != blob.name:
            raise InputError(
                f"{file} is damaged, its digest is not the Hub's: delete {blob} and run "
                "the same command again."
            )
