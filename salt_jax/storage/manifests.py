"""Manifests, which describe a data folder and whether it is complete.

FOLDER/manifest.json holds counts, digests and settings; FOLDER/COMPLETED, written last, holds the
manifest's digest. Readers refuse a folder without it, or of another kind or version.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from salt_jax.errors import InputError
from salt_jax.storage.durable_files import make_folder, write_text
from salt_jax.storage.json_files import Shape, no_link_out, read_json_object, require_shape

MANIFEST_FILE = "manifest.json"
COMPLETED_FILE = "COMPLETED"
DIGESTS_FILE = "digests.json"  # a checkpoint's counterpart of COMPLETED

# The version of each kind's layout on disk, raised whenever an older reader would misread a newer
# folder; and the oldest version still read.
FORMAT_VERSIONS = {"packed_cache": 1, "row_scores": 3, "selection": 1, "soft_labels": 2}
_OLDEST_VERSIONS = {**FORMAT_VERSIONS, "row_scores": 2}

# The cost of a model's pass over rows, in manifests and in cost.json beside them.
COST: Shape = {"flops": float, "tokens": float, "seconds": float}

_SHARD = {"rows": int, "bytes": int, "digest": str}
_SCORER = {"path": str, "step": int, "digest": str}
_OF_ROWS = {"cache_digest": str, "split": str, "rows": int}
_DOCUMENTS = ("documents", "bytes", "shared_documents", "duplicate_documents")
_COUNTS = dict.fromkeys(("rows", "tokens", *_DOCUMENTS), int)

# The entries that readers rely on, by kind.
_SHAPES: Mapping[str, Shape] = {
    "packed_cache": {
        "sequence_length": int,
        "subsets": [str],
        "vocabulary": {"size": int, "fingerprint": str, "start_id": int},
        "sources": [{"file": str, "bytes": int, "digest": str}],
        "splits": {
            str: {**_COUNTS, "by_subset": {str: _COUNTS}, "shards": [{**_SHARD, "file": str}]}
        },
    },
    "row_scores": {
        **_OF_ROWS,
        "shard_rows": int,
        "shards": [_SHARD],
        "scorer": _SCORER,
        "k": [int],
        "columns": [[str]],
        "nan_rows": int,
    },
    "selection": {
        **_OF_ROWS,
        "array_digest": str,
        "how": {},
        "scores_digest": (None, str),
        "cut": (None, float),
        "scorer": (None, _SCORER),
        "score": (None, {}),
        "scoring_cost": (None, COST),
    },
    "soft_labels": {
        **_OF_ROWS,
        "shard_rows": int,
        "shards": [_SHARD],
        "selection_digest": (None, str),
        "row_ids_digest": (None, str),
        "teacher": _SCORER,
        "temperature": float,
        "format": {"sequence_length": int, "vocab_size": int, "k": int, "encoding": str},
    },
}

# Kind → its name in messages, and the command that makes it.
_NAMES = {
    "packed_cache": ("a packed cache", "salt prepare"),
    "row_scores": ("scores", "salt score"),
    "selection": ("a selection", "salt select"),
    "soft_labels": ("soft labels", "salt score --soft_labels"),
}


def begin_writing(folder: pathlib.Path) -> None:
    """Makes the folder if needed and removes COMPLETED, so that readers refuse it."""
    make_folder(folder)
    (folder / COMPLETED_FILE).unlink(missing_ok=True)


def write_manifest(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Writes manifest.json, then COMPLETED, once everything the manifest names is on disk.

    Two processes may write the same manifest at once. COMPLETED has the manifest's digest, so a
    stale one is ineffective.
    """
    assert manifest.get("format_version") == FORMAT_VERSIONS.get(manifest.get("kind", "")), (
        f"a manifest needs its kind and format version, got {dict(manifest)}"
    )
    make_folder(folder)
    text = json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_text(folder / MANIFEST_FILE, text)
    write_text(folder / COMPLETED_FILE, json_digest(manifest) + "\n")


def new_manifest(kind: str, **parts: Any) -> dict[str, Any]:
    """A manifest of this kind in the newest format version."""
    return {"kind": kind, "format_version": FORMAT_VERSIONS[kind], **parts}


def read_manifest(path: pathlib.Path, kind: str) -> dict[str, Any]:
    """The manifest of a finished folder of this kind.

    Raises:
      InputError: The folder is missing, half-written, or of another kind or format version, or its
        manifest is missing or malformed.
    """
    what, made_by = _NAMES[kind]
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{path} {found}: expected the folder of {what}, made by `{made_by}`.")
    if not (path / MANIFEST_FILE).exists():
        raise InputError(
            f"{path} holds no {MANIFEST_FILE}: expected the folder of {what}, made by `{made_by}`; "
            f"if that command was interrupted here, run it again."
        )
    if not (path / COMPLETED_FILE).exists():
        raise InputError(
            f"{path} is half-written (it has no {COMPLETED_FILE}): run its `{made_by}` again "
            "to finish it."
        )
    again = f"make the folder again with `{made_by}`"
    for name in (MANIFEST_FILE, COMPLETED_FILE):
        no_link_out(path, path / name, again)
    manifest = read_json_object(path / MANIFEST_FILE, again)
    if manifest.get("kind") != kind:
        found, _ = _NAMES.get(str(manifest.get("kind")), ("something else", ""))
        raise InputError(
            f"{path} holds {found}, expected {what}: name the output folder of `{made_by}`."
        )
    version = manifest.get("format_version")
    if version not in range(_OLDEST_VERSIONS[kind], FORMAT_VERSIONS[kind] + 1):
        raise InputError(
            f"{path} is of format version {version}, this version of salt_jax reads "
            f"{FORMAT_VERSIONS[kind]}: make it again with `{made_by}`."
        )
    with open(path / COMPLETED_FILE, "rb") as completed:
        digest = completed.read(80).decode(errors="replace").strip()
    if digest != json_digest(manifest):
        raise InputError(
            f"{path / MANIFEST_FILE} was changed after the folder was finished: make it again with "
            f"`{made_by}`."
        )
    require_shape(path / MANIFEST_FILE, manifest, _SHAPES[kind], again)
    return manifest


def json_digest(value: Any) -> str:
    """SHA-256 (hex) of a value as canonical JSON: equal content, equal digest."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def file_digest(path: os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file's bytes, on disk or in a bucket."""
    with path.open("rb") if hasattr(path, "open") else open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
