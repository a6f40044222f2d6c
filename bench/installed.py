"""Which peers are installed, and in which version."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def missing(module: str) -> str:
    """Empty where `module` can be imported, else the reason why its contender does not compete."""
    return "" if find_spec(module) else f"{module} is not installed"
