"""The table of measured ways to search, csrc/include/nearest_paths.inc: the library reads it to choose its path.

Times are milliseconds; 0 where a way cannot serve a size, or was wrong there. The next build reads a change.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.sources import ROOT

TABLE = ROOT / "csrc" / "include" / "nearest_paths.inc"
_HEAD = """\
// Milliseconds of an exact search by each way, on one thread of a CPU (processor time) or on a CUDA device; 0 where a
// way cannot serve a size, or was wrong there. `python -m bench.search_paths --write` replaces the lines of a CPU,
// `python -m bench.search_scores --write` those of a CUDA device; nearest_paths.h reads them.
"""
_DEVICE = re.compile(r'DEVICE\("([^"]+)"((?:, "[^"]+")*)\)  // (.*)')
_SHAPE = re.compile(r"SHAPE\(([^)]*)\)")

Size = tuple[int, int, int]  # N, K, D


@dataclass
class Device:
    """The ways of an instruction set ("amx") or a CUDA device ("sm_90"), and their times at each size.

    `note` says what was measured: the machine, and the version of torch.
    """

    name: str
    note: str
    ways: tuple[str, ...]
    times: dict[Size, tuple[float, ...]] = field(default_factory=dict)


def parse(text: str) -> dict[str, Device]:
    """The devices by name.

    Raises:
        ValueError: a line that is neither a comment nor one of the table's two kinds, or has too few times.
    """
    devices: dict[str, Device] = {}
    device = None
    for line in text.splitlines():
        if not line or line.startswith("//"):
            continue
        if found := _DEVICE.fullmatch(line):
            device = Device(found[1], found[3], tuple(re.findall(r'"([^"]+)"', found[2])))
            devices[device.name] = device
            continue
        found = _SHAPE.fullmatch(line)
        numbers = found[1].split(",") if found else []
        if device is None or len(numbers) != 3 + len(device.ways):
            raise ValueError(f"{TABLE.name}: expected DEVICE(...) or SHAPE(N, K, D, a time for each way), got {line!r}")
        device.times[tuple(map(int, numbers[:3]))] = tuple(map(float, numbers[3:]))
    return devices


def text_of(devices: Iterable[Device]) -> str:
    lines = [_HEAD]
    for device in devices:
        names = "".join(f', "{way}"' for way in device.ways)
        lines.append(f'\nDEVICE("{device.name}"{names})  // {device.note}\n')
        for (N, K, D), times in device.times.items():
            columns = [f"{N:6}", f"{K:5}", f"{D:3}", *(f"{f'{time:.3g}':>7}" for time in times)]
            lines.append(f"SHAPE({', '.join(columns)})\n")
    return "".join(lines)


def read() -> dict[str, Device]:
    return parse(TABLE.read_text())


def replace(measured: Iterable[Device]) -> None:
    """Write the table with these devices in place of those of the same names."""
    devices = read() | {device.name: device for device in measured}
    TABLE.write_text(text_of(devices.values()))
