class RunError(ValueError):
    """A run folder or checkpoint that cannot be used as asked, or a training that broke: one line."""
