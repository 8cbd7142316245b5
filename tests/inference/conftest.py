"""The small runs of the training part's tests."""

from tests.training.conftest import run_train, slm

__all__ = ["run_train", "slm"]
