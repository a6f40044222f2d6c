"""From the words of a command line to a command."""

import contextlib
import dataclasses
import difflib
import functools
import io
import operator
import re
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from vqfast.cli.commands import COMMANDS, CONFIGURABLE, GROUPS
from vqfast.cli.errors import UsageError
from vqfast.cli.settings import with_settings

_ABOUT = "Vector quantisation and discrete diffusion on images. Every command takes --debug."
_STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)


def parse(argv: Sequence[str]) -> Any:
    """The command that the arguments describe: an object with `execute()`.

    Raises:
        UsageError: they describe none.
        SystemExit: --help, with exit code 0.
    """
    argv = list(argv) or ["--help"]
    words = _words(argv)
    if words in COMMANDS:
        rest = with_settings(argv, CONFIGURABLE)[len(words.split()) :]
        return _ask(COMMANDS[words], f"vqfast {words}", rest)
    if "--config" in argv:
        raise UsageError(f"--config: expected after one of {', '.join(CONFIGURABLE)}")
    union = functools.reduce(operator.or_, (Annotated[kind, subcommand(name)] for name, kind in _level(words).items()))
    return _ask(union, f"vqfast {words}".strip(), argv[len(words.split()) :], GROUPS.get(words, _ABOUT))


def _words(argv: Sequence[str]) -> str:
    """The words of a command, of a group of commands, or none.

    Raises:
        UsageError: a word that is neither.
    """
    words = ""
    for word in argv:
        if words in COMMANDS or word.startswith("-"):
            break
        known = _level(words)
        if word not in known:
            nearest = difflib.get_close_matches(word, known, n=1)
            hint = f"the nearest is {f'{words} {nearest[0]}'.strip()}" if nearest else f"there are {', '.join(known)}"
            raise UsageError(f"no command {f'{words} {word}'.strip()}; {hint}")
        words = f"{words} {word}".strip()
    return words


def _level(words: str) -> dict[str, type]:
    """The next words behind these, each with what describes it."""
    if words:
        return {name.split()[1]: kind for name, kind in COMMANDS.items() if name.split()[0] == words}
    groups = {name: dataclasses.make_dataclass(name, (), namespace={"__doc__": text}) for name, text in GROUPS.items()}
    return {name.split()[0]: groups.get(name.split()[0], kind) for name, kind in COMMANDS.items()}


def _ask(kind: Any, program: str, argv: Sequence[str], about: str | None = None) -> Any:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=program, description=about, args=list(argv), config=_STYLE)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(f"{_unboxed(complaint.getvalue())} ({program} --help tells more)") from None


def _unboxed(panel: str) -> str:
    """The message in the frame that the parser draws: its lines up to the first rule behind them."""
    message: list[str] = []
    for line in panel.splitlines()[1:]:
        text = line.strip("│|╰╯ ")
        if text and not text.strip("─-"):
            if message:
                break
        else:
            message.append(text)
    return _plain(re.sub(r"\s+", " ", " ".join(message)).strip())


_NUMBERS = {"INT": "a whole number", "FLOAT": "a number", "int": "a whole number", "float": "a number"}


def _plain(message: str) -> str:
    """In words of the command line where the parser has those of its own."""
    one = re.match(r"Error parsing (--[\w-]+): [^:]*\b(int|float)(?:\(\) with base 10)?: '(.*)'$", message)
    if one:
        return f"{one[1]}: expected {_NUMBERS[one[2]]}, got {one[3]}"
    optional = re.match(r"Error parsing (--[\w-]+): no type matching {None}\|{?([^}]+?)}? could .*? \[(.*?)\]", message)
    if optional:
        flag, expected, given = optional.groups()
        words = " ".join(re.findall(r"'(.*?)'", given))
        return f"{flag}: expected {_NUMBERS.get(expected, expected)}, got {words or 'nothing'}"
    # A setting that its own class refuses, under its name there.
    return re.sub(r"^Error parsing \w+: (\w+): ", lambda found: f"--{found[1].replace('_', '-')}: ", message)
