"""`python -m salt_jax` is the `salt` command."""

import sys

from salt_jax.main import main


def run() -> None:
    """The entry point of the installed `salt` command."""
    sys.exit(main())


if __name__ == "__main__":
    run()
