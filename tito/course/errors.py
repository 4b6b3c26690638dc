"""The one kind of error that a user of tito may cause: what came, what is needed, and what to do now."""


class CourseError(Exception):
    """A mistake that the user can mend. `message` says what came and what is needed, `hint` what to do now."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint
