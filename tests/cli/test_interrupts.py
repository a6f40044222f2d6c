"""Ctrl-C ends every command quietly, with exit code 130, from its first moment on."""

import os
import signal
import subprocess
import sys

# A torch that is interrupted while it is imported, and makes another error of it, as extension modules do.
TORCH = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except BaseException as error:
    raise ImportError("numpy.core.multiarray failed to import") from error
"""


def started(tmp_path, *words):
    (tmp_path / "torch.py").write_text(TORCH)
    return subprocess.run(
        [sys.executable, "-m", "vqfast.cli", *words],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60,
        # A shell has its background jobs ignore the signal, and they their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_while_torch_is_imported(tmp_path):
    for words in (["train", "vqvae", "--data", "digits", "--out", "run"], ["doctor"], ["--help"]):
        result = started(tmp_path, *words)
        assert (result.returncode, result.stdout, result.stderr) == (130, "", "vqfast: interrupted\n"), words


def test_the_version_is_said_without_torch(tmp_path):
    result = started(tmp_path, "--version")
    assert result.returncode == 0 and result.stdout.startswith("vqfast ") and result.stderr == ""
