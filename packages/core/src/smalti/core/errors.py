"""The error that a user can mend."""


class UserError(ValueError):
    """A mistake of the user's, told in one sentence: what, where, and what would be right.

    The command line prints the sentence and ends with exit code 2; everything else that escapes is a
    defect of smalti or of a plugin and keeps its traceback.
    """
