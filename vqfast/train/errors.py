class RunError(ValueError):
    """A run folder or checkpoint that cannot be used as asked, or a training that broke: one line."""


class CheckpointError(RunError):
    """A checkpoint that could not be written; nothing of it is left, and the earlier ones are as they were."""
