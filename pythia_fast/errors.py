"""The two ways a command ends that are not a bug; ``cli.main`` prints one line for each."""


class Ending(Exception):
    """One line that says what and where.

    shared: every process of the launch raises it, so that the first alone need say it. rank: of
    the process that alone raised it.
    """

    shared = False
    rank: int | None = None


class InputError(Ending):
    """What the user gave cannot be used. Exit code 2."""


class CheckError(Ending):
    """The thing that was checked is wrong. Exit code 1."""
