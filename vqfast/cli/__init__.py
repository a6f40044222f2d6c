"""The command `vqfast`: one line and exit code 2 for what the user can put right, 1 for what only we can."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

# Import name -> nothing but membership: what `pip install "vqfast[train]"` brings.
_TRAIN_EXTRA = (
    "accelerate", "huggingface_hub", "matplotlib", "PIL", "safetensors", "sklearn", "tensorboard", "tqdm", "tyro",
    "yaml",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; default those of the process.

    Returns:
        Exit code: 0, 2 for a wrong argument, path, image or checkpoint, 1 for an error in vqfast, 130 if interrupted,
        141 where nobody reads the output.

    Raises:
        SystemExit: --help, or a training that was asked to stop and saved its work; exit code 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        run_command(arguments, own_process=argv is None)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has seen enough, as `vqfast presets | head -1` has. What is left to flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell calls the signal
    except KeyboardInterrupt as interrupt:
        print("; ".join(["vqfast: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"vqfast: {_one_line(error)}", file=sys.stderr)
        return 2 if _is_users(error) else 1
    return 0


def run_command(argv: Sequence[str], *, own_process: bool = False) -> None:
    """Parse and run; errors come out as exceptions. `--help` ends the process, as a parser does.

    Args:
        argv: arguments after the program's name.
        own_process: the process is there for this command alone.
    """
    if list(argv) == ["--version"]:
        import vqfast

        print(f"vqfast {vqfast.__version__}")
        return
    with _ended_by_interrupt() if own_process else nullcontext():
        command = _command(argv)
    try:
        command.execute()
    except SystemExit as stop:
        if hasattr(command, "resume"):
            raise
        # A training within a comparison or a demo: its checkpoint is kept, but what it was for is not done.
        raise KeyboardInterrupt("only that training can go on, by vqfast train; this command begins anew") from stop


def _command(argv: Sequence[str]) -> Any:
    # Before the parser is imported: this must work, and say why, where the rest is not installed.
    if list(argv) == ["doctor"]:
        from vqfast.cli.doctor import Doctor

        return Doctor()
    from vqfast.cli.parser import parse

    return parse(argv)


@contextmanager
def _ended_by_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C ends the process: thrown into a module that is being loaded, as torch is for seconds, an exception
    becomes some other one, or none."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where it is ignored, as behind nohup
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"vqfast: interrupted\n")
    os._exit(130)


def _is_users(error: Exception) -> bool:
    return isinstance(error, ValueError | OSError) or _missing_extra(error)


def _missing_extra(error: Exception) -> bool:
    return isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _TRAIN_EXTRA


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if _missing_extra(error):
        return f'{error.name} is not installed; install what this command needs: pip install "vqfast[train]"'
    if isinstance(error, OSError):
        if error.filename:
            return f"{error.filename}: {error.strerror}"
        return f"{error.strerror} (--debug shows where)" if error.strerror else text
    if isinstance(error, ValueError):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
