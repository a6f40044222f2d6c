"""`vqfast doctor`."""

from dataclasses import dataclass

from vqfast.doctor import report


@dataclass
class Doctor:
    """Say what is installed, which backends run here, and why the others do not."""

    def execute(self) -> None:
        print(report())
