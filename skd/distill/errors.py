"""The one exception that stands for a mistake in what the user asked for or gave."""


class DistillError(ValueError):
    """A run that cannot go on for a reason the user can mend; its text is one sentence and says how.

    The command line prints it as one line without a traceback and exits with status 2.
    """
