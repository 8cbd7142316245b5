"""The key-value store that the processes of a run share: jax's coordination service, in process 0.

jax has no public name for it; this module is the only one that uses the private one.
"""

from typing import Any

_PREFIX = "salt_jax/"


class KeyValueStore:
    """Texts by key. Calls may raise jax's RuntimeError when process 0 can't be reached."""

    def __init__(self) -> None:
        from jax._src import distributed

        self._client: Any = distributed.global_state.client
        assert self._client is not None, "jax.distributed is not initialized"

    def put(self, key: str, text: str) -> None:
        """Sets a key; blocks while process 0 doesn't answer."""
        self._client.key_value_set(_PREFIX + key, text, allow_overwrite=True)

    def get(self, key: str, seconds: float) -> str | None:
        """The text of a key, None if there is no answer within some seconds."""
        try:
            found: str = self._client.blocking_key_value_get(_PREFIX + key, round(1000 * seconds))
        except RuntimeError:
            return None
        return found
