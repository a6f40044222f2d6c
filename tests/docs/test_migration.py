"""The page for users of vector-quantize-pytorch lists every option of theirs, and says the truth about each."""

import inspect
import re
from pathlib import Path

import pytest

import vqfast.nn
from tests.nn import test_residual_vq, test_vector_quantize_peer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from-vector-quantize-pytorch.md"
CLASSES = ["VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "FSQ", "LFQ", "SimVQ"]


def listed(name: str) -> dict[str, str]:
    """Option to what the page says of it."""
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE).group(1)
    said = {}
    for options, status in re.findall(r"^\| (`.*?) \| (\w[\w ]*?) \|", section, re.MULTILINE):
        for option in re.findall(r"`([^`]+)`", options):
            assert option not in said, f"{option} is listed twice"
            said[option] = status
    return said


def options_of(module: type) -> set[str]:
    def named(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}

    return named(module.__init__) | {f"forward({name})" for name in named(module.forward)}


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_of_the_peer_is_listed(name):
    peer = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    assert set(listed(name)) == options_of(getattr(peer, name))


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_said_to_be_offered_is(name):
    ours = options_of(getattr(vqfast.nn, name))
    said = listed(name)
    assert set(said.values()) <= {"same", "differs", "not offered"}
    for option, status in said.items():
        if option in ("forward(z)", "heads"):  # renamed to x; checked and refused by ResidualVQ
            continue
        assert (option in ours) == (status != "not offered"), f"{option}: {status}"


@pytest.mark.parametrize(
    ("name", "tests"), [("VectorQuantize", test_vector_quantize_peer), ("ResidualVQ", test_residual_vq)]
)
def test_what_is_said_to_be_the_same_is_trained_side_by_side(name, tests):
    said = {option for option, status in listed(name).items() if status == "same" and not option.startswith("forward")}
    tried = set(tests.SIZES).union(*tests.SHARED_OPTIONS) | {"return_zeros_for_masked_padding"}
    assert said <= tried


def test_classes_said_to_be_missing_are():
    missing = re.search(r"Not offered at all: (.*)", PAGE.read_text(), re.DOTALL).group(1)
    assert not set(re.findall(r"`(\w+)`", missing)) & set(vqfast.nn.__all__)
