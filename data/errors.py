"""The errors that a run ends with on purpose; any other exception is a bug."""


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
