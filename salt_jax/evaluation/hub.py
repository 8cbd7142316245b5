"""The Hugging Face Hub, where tasks' data sets are: out of reach, they come from the cache at once.

Left alone, `datasets` retries each of a data set's files for half a minute, also what it has in its
cache.
"""

import urllib.error
import urllib.request

import datasets
from huggingface_hub import constants

from salt_jax.terminal import say

_SECONDS = 10.0


def do_without_the_hub_if_out_of_reach() -> None:
    """Asks the Hub for a sign of life, and takes its libraries offline where there is none."""
    if datasets.config.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        return
    say(f"{constants.ENDPOINT} is out of reach: data sets come from the cache alone.")
    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, method="HEAD"), timeout=_SECONDS
        ):
            return True
    except urllib.error.HTTPError:
        return True  # whatever it said
    except OSError:
        return False
