"""The one error that is the user's to mend."""


class UserError(ValueError):
    """Something the user gave is wrong; the message names the cause and the mend.

    Scripts print the message alone and leave with exit code 2.
    """
