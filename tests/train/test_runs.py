"""What run folders promise: nothing is ever overwritten, and each says what it is."""

import pytest

import vqfast
from vqfast.train import RunError, check_new, create_run, open_run


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_says_what_it_is(tmp_path):
    create_run(tmp_path / "a" / "b", "vqvae", {"model": {"channels": 32}})
    run = open_run(tmp_path / "a" / "b", "vqvae")
    assert run.kind == "vqvae" and run.info["model"] == {"channels": 32}
    assert run.info["version"] == vqfast.__version__


def test_an_empty_folder_will_do(tmp_path):
    create_run(tmp_path, "vqvae", {})
    assert open_run(tmp_path).kind == "vqvae"


def fill(folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("ten years of work")


def finished_sample(folder):
    create_run(folder, "sample", {})


def started_training(folder):
    create_run(folder, "vqvae", {"training": {}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (fill, "is not a run; nothing was changed"),
        (lambda path: path.write_text("a file"), "is not a folder"),
        (finished_sample, "already holds a sample run; choose another --out"),
        (started_training, "already holds a vqvae run; add --resume"),
    ],
)
def test_nothing_is_overwritten(tmp_path, make, message):
    out = tmp_path / "out"
    make(out)
    before = tree(tmp_path)
    for function in (check_new, lambda path: create_run(path, "vqvae", {})):
        with pytest.raises(RunError, match=message):
            function(out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "no such run"),
        ({}, "not a run"),
        ({"run.json": "{"}, "not readable"),
        ({"run.json": "[]"}, "expected a JSON object"),
        ({"run.json": "{}"}, "not a description of a run"),
        ({"run.json": '{"kind": "sample"}'}, "holds a sample run, expected a vqvae run"),
    ],
)
def test_what_is_not_such_a_run_is_named(tmp_path, contents, message):
    path = tmp_path / "run"
    if contents is not None:
        path.mkdir()
        for name, text in contents.items():
            (path / name).write_text(text)
    with pytest.raises(RunError, match=message) as caught:
        open_run(path, "vqvae")
    assert str(path) in str(caught.value)
