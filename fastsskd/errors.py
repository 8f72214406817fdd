"""The two ways a user's input can be wrong, and the exit code each one ends with."""


class InputError(Exception):
    """The input or the result is bad: one line saying what, where and what to do. Commands exit with 1."""

    exit_code = 1


class SharedError(InputError):
    """An input error that every rank raises in the same words, so that one of them speaks for all."""


class UsageError(InputError):
    """The command or its configuration is wrong (unknown key, value out of range). Commands exit with 2."""

    exit_code = 2
