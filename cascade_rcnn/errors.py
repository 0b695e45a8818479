"""Errors that a user can fix: each message names the file, the value and the remedy."""


class UserError(ValueError):
    """Something the user gave cannot be used; the command line prints the message and exits with code 2."""


class ConfigError(UserError):
    """A configuration value or name that is not valid."""


class DataError(UserError):
    """A data set, annotation file or image that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, of another kind, damaged or unsafe."""
