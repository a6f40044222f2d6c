"""Images that are decoded when read: the same as in memory, in any process, and robust to broken ones."""

import io
import logging
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vqfast.data import DataError, ImageBatches, ShuffledSteps, open_dataset, to_uint8

RNG = np.random.default_rng(0)
COUNT = 120
IMAGES = RNG.integers(0, 256, (COUNT, 12, 10, 3), dtype=np.uint8)
LABELS = np.arange(COUNT) % 3


def png(image) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def folder(path):
    for i, image in enumerate(IMAGES):
        place = path / f"class {LABELS[i]}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:03}.png").write_bytes(png(image))
    return path


def zipped(path):
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for i, image in enumerate(IMAGES):
            archive.writestr(f"class {LABELS[i]}/{i:03}.png", png(image))
    return path.with_suffix(".zip")


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def shards(path, label="cls"):
    path.mkdir()
    for shard in range(3):
        with tarfile.open(path / f"train-{shard:02}.tar", "w") as archive:
            for i in range(shard * COUNT // 3, (shard + 1) * COUNT // 3):
                add(archive, f"images/{i:06}.png", png(IMAGES[i]))
                name, kind = f"images/{i:06}.{label}", str(LABELS[i])
                add(archive, name, (kind if label == "cls" else f'{{"label": {kind}, "caption": "x"}}').encode())
    return path


def saved(path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["class 0", "class 1", "class 2"])}
    )
    rows = {"image": [{"bytes": png(image), "path": None} for image in IMAGES], "label": LABELS.tolist()}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("make", [folder, zipped, shards, saved])
def test_decoding_later_gives_what_decoding_now_gives(tmp_path, make):
    source = make(tmp_path / "set")
    now, later = (open_dataset(source, image_size=8, in_memory=held) for held in (True, False))
    assert isinstance(now.images, np.ndarray) and not isinstance(later.images, np.ndarray)
    assert later.images.shape == now.images.shape == (COUNT, 8, 8, 3)
    for chosen in (5, slice(2, 9), np.array([7, 0, 7])):
        assert np.array_equal(later.images[chosen], now.images[chosen])
    assert np.array_equal(later.labels, now.labels) and later.classes == now.classes and len(now.classes) == 3
    first = now.labels == now.labels[0]
    assert first.sum() == COUNT // 3
    assert later.held_out.sum() == COUNT // 8


def test_shards_by_range_and_by_json(tmp_path):
    source = shards(tmp_path / "set", label="json")
    ranged = open_dataset(str(source / "train-{00..01}.tar"))
    assert np.array_equal(ranged.images, IMAGES[: 2 * COUNT // 3])
    assert np.array_equal(ranged.labels, LABELS[: 2 * COUNT // 3]) and ranged.classes == ("0", "1", "2")
    one = open_dataset(source / "train-02.tar")
    assert np.array_equal(one.images, IMAGES[2 * COUNT // 3 :])


@pytest.mark.parametrize("make", [folder, zipped, shards, saved])
def test_workers_and_pickles_read_the_same(tmp_path, make):
    data = open_dataset(make(tmp_path / "set"), image_size=8, in_memory=False)
    batches = ImageBatches(data, "all")
    visits = list(ShuffledSteps(COUNT, 16, range(6), seed=0))
    batches[visits[0]]  # the file is open in this process before the workers fork
    expected = [batches[v]["image"] for v in visits]
    loader = DataLoader(batches, sampler=visits, batch_size=None, num_workers=2)
    for got, want in zip(loader, expected, strict=True):
        assert torch.equal(got["image"], want)
    again = pickle.loads(pickle.dumps(batches))
    assert torch.equal(again[visits[0]]["image"], expected[0])


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_broken_image_is_skipped_and_named(tmp_path, in_memory, caplog):
    source = folder(tmp_path / "set")
    (source / "class 1" / "004.png").write_bytes(b"not an image")
    data = open_dataset(source, image_size=8, in_memory=in_memory)
    with caplog.at_level(logging.WARNING):
        # Where the broken image was, the next one stands, with its own label.
        at = list(data.labels).index(1) + (0 if in_memory else 1)
        batch = ImageBatches(data, "all")[np.array([at - 1, at, at])]
    whole = open_dataset(folder(tmp_path / "whole"), image_size=8)
    images = {image.tobytes(): label for image, label in zip(whole.images, whole.labels, strict=True)}
    for image, label in zip(to_uint8(batch["image"]), batch["label"], strict=True):
        assert images[image.tobytes()] == label
    named = [r.message for r in caplog.records if "broken image class 1/004.png skipped" in r.message]
    assert len(named) == 1


@pytest.mark.parametrize("in_memory", [True, False])
def test_more_than_one_in_a_hundred_stops(tmp_path, in_memory):
    source = folder(tmp_path / "set")
    for name in ("class 0/000.png", "class 0/003.png"):
        (source / name).write_bytes(b"not an image")
    message = r"broken image class 0/00\d.png: not a known .*, also class 0/00\d.png \(2 broken of 120; up to 1% "
    with pytest.raises(DataError, match=message):
        data = open_dataset(source, image_size=8, in_memory=in_memory)
        data.images[np.arange(COUNT)]


@pytest.mark.slow  # torch takes 5 s to shut down a worker that raised
def test_a_worker_that_finds_too_many_broken_ones_says_so(tmp_path):
    source = folder(tmp_path / "set")
    data = open_dataset(source, image_size=8, in_memory=False)
    for path in (source / "class 2").glob("*.png"):
        path.write_bytes(b"not an image")
    visits = list(np.arange(COUNT).reshape(10, -1))
    with pytest.raises(DataError, match="broken image class 2/"):
        list(DataLoader(ImageBatches(data, "all"), sampler=visits, batch_size=None, num_workers=1))


def test_grey_images_stay_grey(tmp_path):
    for i in range(3):
        Image.fromarray(IMAGES[i, :, :, 0]).save(tmp_path / f"{i}.png")
    assert open_dataset(tmp_path, image_size=8, in_memory=False).images[0].shape == (8, 8, 1)


def break_text(path):
    path.with_suffix(".tar").write_text("hello")
    return path.with_suffix(".tar")


def break_class(path):
    shards(path)
    with tarfile.open(path / "train-03.tar", "w") as archive:
        add(archive, "x.png", png(IMAGES[0]))
    return path


def break_json(path):
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        add(archive, "x.png", png(IMAGES[0]))
        add(archive, "x.json", b"[1")
    return path.with_suffix(".tar")


def break_range(path):
    path.mkdir()
    return path / "train-{0..3}.tar"


def break_splits(path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"x": [1]})}).save_to_disk(str(path))
    return path


def break_columns(path):
    pytest.importorskip("datasets").Dataset.from_dict({"x": [1]}).save_to_disk(str(path))
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (break_text, "not a readable .tar"),
        (break_class, "x lacks a class, unlike train-00.tar:images/000000.png"),
        (break_json, "x.json: no class to be read"),
        (break_range, "train-0.tar: no such file"),
        (break_splits, "splits train: name the folder of one"),
        (break_columns, "one column of images, got 0 among x"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, make, message):
    source = make(tmp_path / "set")
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(source)
    assert "\n" not in str(caught.value)


def test_decoding_later_needs_a_size(tmp_path):
    with pytest.raises(DataError, match="--image-size"):
        open_dataset(folder(tmp_path / "set"), in_memory=False)
