"""The error for data that is missing or corrupt."""


class DataError(Exception):
    """Missing or corrupt data; the message names the path, what belongs there and the way out."""
