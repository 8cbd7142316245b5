"""The kinds of layers in a config.json: `layer_types` and `sliding_window`."""

from collections.abc import Mapping, Sequence
from typing import Any

from salt_jax.errors import InputError

FIELDS = ("layer_types", "sliding_window")
_KINDS = {"full_attention": "global", "sliding_attention": "local"}


def read_layers(
    settings: Mapping[str, Any], usual: Sequence[str], window: int | None, where: str
) -> dict[str, Any]:
    """DecoderConfig's layer_kinds and window.

    Args:
        settings: the config.json.
        usual: layer_types by default.
        window: the window of layers with sliding attention.
        where: the file, for errors.

    Raises:
        InputError: layer_types are not one known kind for each layer, or need a window.
    """
    types = settings.get("layer_types")
    types = list(usual) if types is None else types
    is_known = isinstance(types, list) and all(isinstance(t, str) and t in _KINDS for t in types)
    if not is_known or len(types) != len(usual):
        raise InputError(
            f"{where} sets layer_types to {types!r}, expected one of {', '.join(_KINDS)} for each "
            f"of {len(usual)} layers: choose another model."
        )
    if "sliding_attention" not in types:
        return {}
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise InputError(
            f"{where} sets layer_types to {types!r} and its sliding window is {window!r}, expected "
            "a number of tokens: download the folder again."
        )
    return {"layer_kinds": tuple(_KINDS[one] for one in types), "window": window}


def write_layers(kinds: Sequence[str], window: int | None) -> dict[str, Any]:
    """The inverse of read_layers, for the kind of each layer."""
    names = {ours: theirs for theirs, ours in _KINDS.items()}
    return {"layer_types": [names[kind] for kind in kinds], "sliding_window": window}
