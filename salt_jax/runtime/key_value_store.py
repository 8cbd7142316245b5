"""The key-value store shared by the processes of a run: jax's coordination service in process 0.

jax has no public API for it; only this module uses the private one.
"""

from typing import Any

_PREFIX = "salt_jax/"


class KeyValueStore:
    """Strings by key. Calls may raise jax's RuntimeError when process 0 can't be reached."""

    def __init__(self) -> None:
        from jax._src import distributed

        self._client: Any = distributed.global_state.client
        assert self._client is not None, "jax.distributed is not initialized"

    def put(self, key: str, text: str) -> None:
        """Sets a key; blocks until process 0 answers."""
        self._client.key_value_set(_PREFIX + key, text, allow_overwrite=True)

    def get(self, key: str, seconds: float) -> str | None:
        """The value of a key, or None if there is no answer within `seconds`."""
        try:
            found: str = self._client.blocking_key_value_get(_PREFIX + key, round(1000 * seconds))
        except RuntimeError:
            return None
        return found
