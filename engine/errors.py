"""Exceptions, and the exit codes that the command line gives them."""


class BoostDiffError(Exception):
    """Something failed that no other input would have avoided; exit code 1."""

    exit_code = 1


class InputError(BoostDiffError):
    """A wrong option, path or file; the message says what to do instead; exit code 2."""

    exit_code = 2


def one_line(error: BaseException) -> str:
    """The first line of what an error says that isn't blank, or the name of its type."""
    try:
        lines = [line.strip() for line in str(error).splitlines()]
    except Exception:
        lines = []
    return next(filter(None, lines), type(error).__name__)
