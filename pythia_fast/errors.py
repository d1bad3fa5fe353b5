"""The two ways a command ends that are not a bug; ``cli.main`` prints one line for each."""


class InputError(Exception):
    """What the user gave cannot be used. One line that says what and where; exit code 2."""


class CheckError(Exception):
    """The thing that was checked is wrong. One line that says what and where; exit code 1."""
