"""The errors that a run ends with on purpose, any other being a bug; and what messages quote."""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlevel, _SHORT.maxdict = 3, 6


class UserError(ValueError):
    """What a user can mend: a flag, a file, a row, a model folder.

    Its text says what is wrong, where, what was found and what to do. A run ends with that text and
    exit code 2 (grpo/run/exits.py). Every other exception keeps its traceback: it is a bug, or a
    researcher's own edit.
    """


class ImageFault(UserError):
    """An image that could be read when the run began and cannot any more: its row and file.

    The run saves what it has trained and ends with the message.
    """


class RewardFault(Exception):
    """A reward failed: the error, the row and the completion. Its cause is the error itself.

    The run saves what it has trained and ends with the traceback.
    """


def shown(value) -> str:
    """repr(value) for a message, cut to what a reader takes in, however large or deep it is."""
    return _SHORT.repr(value)


def reason(error: BaseException) -> str:
    """The first line of an error's text, cut; its class where it has no text, as MemoryError."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]:.300}" if lines else type(error).__name__
