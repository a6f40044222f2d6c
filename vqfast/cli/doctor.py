"""`vqfast doctor`."""

from dataclasses import dataclass


@dataclass
class Doctor:
    """Say what is installed, which backends run here, and why the others do not."""

    def execute(self) -> None:
        from vqfast.doctor import report

        print(report())
