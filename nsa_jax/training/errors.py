"""What stops a run for a reason that its user can act on."""


class RunError(Exception):
    """A run cannot start or go on; the text says why and what to do, in sentences.

    The command line prints the text without a traceback and exits with status 1.
    """


class WorkdirError(RunError):
    """The working folder holds something that this run would damage or could not continue."""


class CheckpointError(RunError):
    """No checkpoint can be used, or one must not be written."""


class NonFiniteError(RunError):
    """The loss, a gradient or a parameter is infinite or not a number."""


class RunInterrupted(Exception):  # noqa: N818 (asked for by the user, so no error)
    """The run was asked to stop by a signal; its state has been saved.

    Attributes:
      status: the exit status by convention, 128 + the signal's number.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status
