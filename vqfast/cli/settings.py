"""Settings of a training command as YAML: read from --config, written beside the run as config.yaml.

format: 1
command: train vqvae
data: photos/
image_size: 64
training:
  steps: 20000
"""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from vqfast.cli.errors import UsageError
from vqfast.train.runs import FORMAT, check_format

CONFIG_FILE = "config.yaml"
# Not settings: where a run goes, and whether it is a new one.
_LEFT_OUT = ("out", "resume")


def write_settings(run: Path, command: str, settings: Any, resolved: dict[str, Any]) -> None:
    """Write config.yaml, from which `vqfast COMMAND --config RUN/config.yaml --out ANOTHER` makes the same run.

    Args:
        run: folder of the run.
        command: such as "train vqvae".
        settings: the command's dataclass.
        resolved: values in place of those that were left to be chosen (None).
    """
    import yaml

    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _LEFT_OUT}
    chosen = {name: resolved[name] for name, value in values.items() if value is None and name in resolved}
    # Groups of settings last.
    ordered = dict(sorted((values | chosen).items(), key=lambda item: isinstance(item[1], dict)))
    text = yaml.safe_dump({"format": FORMAT, "command": command} | plain(ordered), sort_keys=False)
    beside = run / f".{CONFIG_FILE}.{os.getpid()}"
    beside.write_text(text)
    beside.replace(run / CONFIG_FILE)


def with_settings(argv: Sequence[str], commands: dict[str, type]) -> list[str]:
    """Arguments in which `--config FILE` has given way to the settings in the file; later arguments override them.

    Args:
        argv: such as ["train", "vqvae", "--config", "a.yaml", "--out", "b"].
        commands: dataclass of each command that takes --config, under "train vqvae" and so on.

    Raises:
        UsageError: a command without settings, a file that cannot be read or is of another command, an unknown key.
        RunError: a file of a newer version.
    """
    place = next((i for i, argument in enumerate(argv) if argument.split("=")[0] == "--config"), None)
    if place is None:
        return list(argv)
    _, equals, value = argv[place].partition("=")
    rest = argv[place + 1 :]
    if not equals:
        if not rest:
            raise UsageError("--config: expected a YAML file")
        value, rest = rest[0], rest[1:]
    words = next((n for n in (1, 2) if " ".join(argv[:n]) in commands), 0)
    if not 0 < words <= place:
        raise UsageError(f"--config: expected after one of {', '.join(commands)}")
    command, given = " ".join(argv[:words]), [*argv[words:place], *rest]
    flags, positional = _arguments(_read(Path(value), command), commands[command], Path(value))
    # One given on the command line stands right behind the command, and in place of the file's.
    own = given and not given[0].startswith("-")
    return [*argv[:words], *([given.pop(0)] if own else positional), *flags, *given]


def _read(path: Path, command: str) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UsageError(f"{path}: not readable: {reason}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: expected settings (name: value), got {type(settings).__name__}")
    check_format(settings, path)
    settings.pop("format", None)
    described = settings.pop("command", command)
    if described != command:
        raise UsageError(f"{path}: settings of vqfast {described}, not of vqfast {command}")
    return settings


def _arguments(settings: dict[str, Any], described: type, path: Path, inside: str = "") -> tuple[list[str], list[str]]:
    """The settings as command line arguments, so that one parser checks both: flags, and those without one."""
    fields = {field.name: field for field in dataclasses.fields(described)}
    flags: list[str] = []
    positional: list[str] = []
    for name, value in settings.items():
        if name not in fields:
            nearest = difflib.get_close_matches(str(name), fields, n=1, cutoff=0)[0]
            raise UsageError(f"{path}: unknown setting {inside}{name}; the nearest is {inside}{nearest}")
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise UsageError(f"{path}: {inside}{name}: expected settings (name: value), got {value!r}")
            flags += _arguments(value, kind, path, f"{inside}{name}.")[0]
        elif kind == Positional[Path]:
            positional.append(str(value))
        elif value is not None:
            flags += _argument(name, value, fields[name].default)
    return flags, positional


def _argument(name: str, value: Any, default: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        # A switch has one form: that which turns it from its default.
        return [] if value == default else [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list | tuple):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}", str(value)]


def plain(value: Any) -> Any:
    """Of the types that YAML and JSON have only."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
