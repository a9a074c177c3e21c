"""The errors a user can cause; the command line turns them into exit codes."""


class UsageError(ValueError):
    """The command was wrong: say what was wrong, what would be right, what to type."""

    exit_code = 2


class DataError(ValueError):
    """The files given were wrong: name every bad one and what to do about it."""

    exit_code = 3


class ProtocolError(ValueError):
    """Two results that were measured in different ways."""

    exit_code = 5
