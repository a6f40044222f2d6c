class DataError(ValueError):
    """A data source that cannot be used as asked: one line that names the source and what is wrong."""
