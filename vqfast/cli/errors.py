class UsageError(ValueError):
    """Arguments that do not parse."""
