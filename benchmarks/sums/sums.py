"""The documents of the task `sums`: 24, and four examples."""

from typing import Any

import datasets


def documents(**_: Any) -> dict[str, datasets.Dataset]:
    """Sums with four choices, the first of which is right, by split."""
    pairs = [(17 + 7 * n % 64, 11 + 5 * n % 48) for n in range(28)]
    rows = [
        {"sum": f"{a} + {b} =", "choices": [f" {a + b + more}" for more in (0, 1, 10, -2)]}
        for a, b in pairs
    ]
    splits = {"test": rows[:-4], "examples": rows[-4:]}
    return {name: datasets.Dataset.from_list(part) for name, part in splits.items()}
