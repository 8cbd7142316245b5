"""The exceptions that main.py turns into a sentence and an exit code."""


class InputError(ValueError):
    """Bad input or a bad setting, in one sentence: what was got, what was expected, what to change."""


class RunFailed(RuntimeError):
    """The run itself failed, in one sentence (too many non-finite updates, say): exit code 1."""


class Interrupted(RuntimeError):
    """The run was asked to stop and has saved its state: exit code 75, start it again."""
