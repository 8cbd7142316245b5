"""The rotary scaling of a config.json, in `rope_parameters` or the older `rope_scaling`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from salt_jax.errors import InputError
from salt_jax.models.rope_scaling import KINDS, RopeScaling

FIELDS = ("rope_scaling", "rope_parameters")
_ORIGINAL = "original_max_position_embeddings"

# Settings of RopeScaling by transformers' names.
_NAMES = {
    "factor": "factor",
    _ORIGINAL: "original_length",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
    "short_factor": "divisors",
}
_NEEDED = {
    "linear": {"factor"},
    "llama3": {"factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", _ORIGINAL},
    "longrope": {"factor", _ORIGINAL, "short_factor"},
}
_OTHERS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_scaling(settings: Mapping[str, Any], where: str) -> RopeScaling | None:
    """The scaling of a config.json, None if it has none.

    Raises:
        InputError: It is of a kind or has a setting that salt_jax doesn't know, lacks one, or the
            two fields differ.
    """
    found = [_scaling(settings, field, where) for field in FIELDS if settings.get(field)]
    if len(found) == 2 and found[0] != found[1]:
        raise InputError(
            f"{where} sets rope_scaling to {settings['rope_scaling']!r} and rope_parameters to "
            f"{settings['rope_parameters']!r}, which differ: delete one of them."
        )
    return found[0] if found else None


def rotary_parameters(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one of the two fields that transformers 5 reads."""
    return next((settings[field] for field in FIELDS if settings.get(field)), {})


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """The inverse of read_scaling."""
    kept = set(_NEEDED[scaling.kind])
    if scaling.kind == "yarn":
        kept |= {"beta_fast", "beta_slow", "truncate"}
    if scaling.kind in ("yarn", "longrope"):
        kept |= {"attention_factor"}
    values = dataclasses.asdict(scaling)
    written = {name: values[ours] for name, ours in _NAMES.items() if name in kept}
    named = {name: value for name, value in written.items() if value is not None}
    if scaling.kind == "longrope":
        named["short_factor"] = named["long_factor"] = list(scaling.divisors)
    return {"rope_type": scaling.kind, **named}


def _scaling(settings: Mapping[str, Any], field: str, where: str) -> RopeScaling | None:
    found = settings[field]

    def refusal(why: str) -> InputError:
        return InputError(f"{where} sets {field} to {found!r}, {why}: choose another model.")

    kind = found.get("rope_type", found.get("type", "default")) if isinstance(found, dict) else None
    if kind not in ("default", *KINDS):
        raise InputError(
            f"{where} sets {field} to the kind {kind!r}, and salt_jax has the rotary scalings "
            f"{', '.join(KINDS)} only: choose another model."
        )
    given = {name: value for name, value in found.items() if value is not None}
    if kind == "longrope":
        # The longer context's factors are not used, since max_length is the original one.
        given.pop("long_factor", None)
        longest = settings.get("max_position_embeddings")
        original = given.setdefault(_ORIGINAL, settings.get(_ORIGINAL, longest))
        if not all(isinstance(n, int) and n > 1 for n in (longest, original)):
            raise InputError(
                f"{where} sets max_position_embeddings to {longest!r} and {_ORIGINAL} to "
                f"{original!r}, expected numbers of tokens: download the folder again."
            )
        given.setdefault("factor", longest / original)
    mscales = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    unscaled = kind == "default" or (kind == "linear" and given.get("factor") == 1)
    of_yarn = _NAMES.keys() - {"short_factor"}
    known = _OTHERS | (of_yarn if kind == "yarn" else _NEEDED.get(kind, set()))
    known |= {"attention_factor"} if kind == "longrope" else set()
    known |= {_ORIGINAL, "factor"} if unscaled else set()
    if kind != "default" and mscales != (None, None) and kind != "yarn":
        raise refusal(f"and mscale is no setting of {kind}")
    for name in sorted(given.keys() - known):
        if not (kind == "linear" and name == _ORIGINAL):
            raise InputError(
                f"{where} sets {name} of the rotary embedding, which salt_jax doesn't have: "
                "choose another model."
            )
    if kind == "default" and given.get("factor", 1) != 1:
        raise refusal("a factor without a kind of scaling")
    if unscaled:
        return None
    if missing := sorted(_NEEDED[kind] - given.keys()):
        raise refusal(f"without {', '.join(missing)}")
    values = {_NAMES[name]: value for name, value in given.items() if name in _NAMES}
    for name, value in values.items():
        is_list = isinstance(value, list)
        numbers = value if is_list else [value]
        are_numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
        if name != "truncate" and not (are_numbers and is_list == (name == "divisors")):
            raise refusal(f"whose {name} is no number")
    # transformers takes the length of the files' own field where there is one.
    original = settings.get(_ORIGINAL)
    if kind != "linear" and original not in (None, values["original_length"]):
        raise refusal(f"and original_max_position_embeddings to {original!r}")
    if all(mscales) and "attention_factor" not in values:
        log = 0.1 * math.log(values["factor"])
        values["attention_factor"] = (mscales[0] * log + 1.0) / (mscales[1] * log + 1.0)
    try:
        return RopeScaling(kind=kind, **values)
    except InputError as error:
        raise refusal(str(error).removesuffix(".")) from error
