"""What counts as the same model when a run is resumed."""

import json

import pytest

from salt_jax.errors import InputError
from salt_jax.models.decoder import DecoderConfig
from salt_jax.training.origin import require_same_origin

CONFIG = DecoderConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32, max_length=32)
# Settings that version 0.1.0 had.
OLD = ("embed_dim", "num_layers", "num_heads", "mlp_dim", "max_length", "rope_theta", "use_bias")


def origin(model: object) -> dict[str, object]:
    rest = ("vocabulary_fingerprint", "cache_digest", "selection_digest", "teacher", "objectives")
    return {"model": model, **dict.fromkeys(rest)}


def test_a_checkpoint_of_a_version_with_fewer_settings_is_resumed() -> None:
    now = CONFIG.to_json()
    require_same_origin(json.loads(json.dumps(origin(now))), origin(now), "step 1")
    older = {name: now[name] for name in OLD}
    require_same_origin(origin(older), origin(now), "step 1")
    with pytest.raises(InputError, match="step 1 was made with the model"):
        require_same_origin(origin({**older, "mlp_dim": 64}), origin(now), "step 1")
