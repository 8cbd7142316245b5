"""Finds gin files in the working directory or among the package's own."""

import pathlib
from collections.abc import Iterable
from typing import TextIO

from salt_jax.errors import InputError, nearest
from salt_jax.storage import gin_files

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
DYNAMIC_REGISTRATION = "from __gin__ import dynamic_registration"


def find_gin_file(name: str, setting: str = "--gin_file") -> str:
    """The path of a gin file ("runs/mini_llm.gin"); InputError, naming `setting`, if not found."""
    candidates = [pathlib.Path(name), CONFIGS / name, CONFIGS / name.removeprefix("gin/")]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    known = [str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.gin")]
    raise InputError(
        f"There is no gin file {name}, neither here nor in {CONFIGS}"
        f"{nearest(name.removeprefix('gin/'), known)}: correct {setting}."
    )


def open_gin_file(name: str) -> TextIO:
    """Opens a gin file by name; gin's file reader."""
    return gin_files.open_text(find_gin_file(name))


def gin_text(modules: Iterable[str], *lines: str) -> str:
    """gin source: imports of the modules, then the lines."""
    split = [m.rpartition(".") for m in sorted({*modules} - {"__gin__.dynamic_registration"})]
    imports = [
        f"from {package} import {name}" if package else f"import {name}"
        for package, _, name in split
    ]
    return "\n".join([DYNAMIC_REGISTRATION, *imports, *lines])
