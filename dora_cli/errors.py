"""The one exception for a user's mistakes; ``cli/run.py`` turns it into a message and exit code 2."""


class UserError(ValueError):
    """Something the user can put right: a mistyped key, a wrong path, malformed data, a damaged file.

    Args:
        message: what is wrong, naming the value received and the key as the user types it.
        where: file and line, or the numbers that contradict each other.
        hint: what to do about it.
    """

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        return "\n  ".join(part for part in (self.message, self.where, self.hint) if part)
