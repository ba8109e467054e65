"""The one exception that stands for a mistake in what the user asked for or gave, and what other exceptions say."""


class DistillError(ValueError):
    """A run that cannot go on for a reason the user can mend; its text is one sentence and says how.

    The command line prints it as one line without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What an exception says, without the lines that follow; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
