"""What `open_dataset` promises: every kind of source, one kind of result, one kind of error."""

import gzip
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from vqfast.data import DataError, open_dataset

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(20) % 3


def write_idx(path, array, compress):
    data = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if compress else data)


def write_classes(folder, images):
    for i, image in enumerate(images):
        place = folder / f"class {LABELS[i]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:02}.png")


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("archive", [False, True], ids=["folder", "zip"])
def test_class_folders(tmp_path, images, archive):
    write_classes(tmp_path / "set", images)
    source = tmp_path / "set"
    if archive:
        source = tmp_path / "set.zip"
        with zipfile.ZipFile(source, "w") as file:
            for path in (tmp_path / "set").rglob("*.png"):
                file.write(path, path.relative_to(tmp_path))
            file.writestr("__MACOSX/set/._00.png", b"not an image")
    data = open_dataset(source)
    order = np.argsort(LABELS, kind="stable")
    assert np.array_equal(data.images, images[order].reshape(20, 6, 5, -1))
    assert np.array_equal(data.labels, LABELS[order])
    assert data.classes == ("class 0", "class 1", "class 2")


def test_a_flat_folder_has_no_labels(tmp_path):
    for i, image in enumerate(COLOUR):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    data = open_dataset(tmp_path)
    assert np.array_equal(data.images, COLOUR)
    assert data.labels is None and data.classes == ()


@pytest.mark.parametrize("shape", [(20, 6, 5), (20, 6, 5, 1), (20, 6, 5, 3)])
def test_npz(tmp_path, shape):
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=LABELS * 10)
    data = open_dataset(tmp_path / "set.npz")
    assert np.array_equal(data.images, images.reshape(20, 6, 5, -1))
    assert np.array_equal(data.labels, LABELS)
    assert data.classes == ("0", "10", "20")


def test_npz_without_labels(tmp_path):
    np.savez(tmp_path / "set.npz", images=GREY)
    assert open_dataset(tmp_path / "set.npz").labels is None


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_with_its_labels_beside_it(tmp_path, suffix):
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    write_idx(path, GREY, bool(suffix))
    assert open_dataset(path).labels is None
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", LABELS.astype(np.uint8), bool(suffix))
    data = open_dataset(path)
    assert np.array_equal(data.images, GREY[..., None])
    assert np.array_equal(data.labels, LABELS)


def test_digits():
    data = open_dataset("digits")
    assert data.images.shape == (1797, 8, 8, 1) and data.images.dtype == np.uint8
    assert data.images.min() == 0 and data.images.max() == 255
    assert data.classes == tuple("0123456789")


def test_images_are_resized_and_cropped_to_a_square(tmp_path):
    gradient = np.tile(np.arange(0, 200, 2, dtype=np.uint8), (40, 1))  # 100 wide, 40 high
    Image.fromarray(gradient).save(tmp_path / "wide.png")
    Image.fromarray(gradient.T.copy()).save(tmp_path / "high.png")
    data = open_dataset(tmp_path, image_size=20)
    assert data.images.shape == (2, 20, 20, 1)
    # The middle 40 of 100 pixels are kept: grey levels 60 to 140.
    assert abs(int(data.images[1, 10, 0, 0]) - 61) <= 2 and abs(int(data.images[1, 10, -1, 0]) - 137) <= 2
    np.savez(tmp_path / "set.npz", images=COLOUR)
    assert open_dataset(tmp_path / "set.npz", image_size=4).images.shape == (20, 4, 4, 3)


def test_modes_of_image_files(tmp_path):
    """16-bit grey is scaled, transparency is laid on white, one image in colour makes all RGB."""
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "b.png")
    Image.new("P", (4, 4)).save(tmp_path / "c.png")
    data = open_dataset(tmp_path)
    assert data.images.shape == (3, 4, 4, 3)
    assert (data.images[0] == 128).all() and (data.images[1] == 255).all() and (data.images[2] == 0).all()


def test_the_split_is_fixed_and_honest(tmp_path):
    images = np.concatenate([GREY, GREY])  # every image twice
    shuffled = RNG.permutation(len(images))
    np.savez(tmp_path / "a.npz", images=images)
    np.savez(tmp_path / "b.npz", images=images[shuffled])
    first, second = open_dataset(tmp_path / "a.npz"), open_dataset(tmp_path / "b.npz")
    assert np.array_equal(first.held_out[shuffled], second.held_out), "it does not depend on the order"
    assert np.array_equal(first.held_out[:20], first.held_out[20:]), "copies stay together"
    assert 5 <= first.held_out.sum() <= 6
    train, held_out = first.indices("train"), first.indices("held-out")
    assert sorted([*train, *held_out]) == list(range(40)) == list(first.indices("all"))


def test_a_single_image_is_not_held_out(tmp_path):
    np.savez(tmp_path / "one.npz", images=GREY[:1])
    data = open_dataset(tmp_path / "one.npz")
    assert list(data.indices("train")) == [0]
    with pytest.raises(DataError, match="no held-out images"):
        data.indices("held-out")


def break_nothing(path):
    pass


def break_empty(path):
    path.mkdir()


def break_image(path):
    path.mkdir()
    for i in range(3):
        Image.fromarray(COLOUR[i]).save(path / f"{i}.png")
    whole = (path / "1.png").read_bytes()
    (path / "1.png").write_bytes(whole[: len(whole) // 2])


def break_text_image(path):
    path.mkdir()
    (path / "x.jpg").write_text("hello")


def break_sizes(path):
    path.mkdir()
    Image.fromarray(GREY[0]).save(path / "0.png")
    Image.fromarray(GREY[1].T.copy()).save(path / "1.png")


def save_npz(**arrays):
    return lambda path: np.savez(path.open("wb"), **arrays)


def cut_idx(path):
    write_idx(path, GREY, compress=False)
    path.write_bytes(path.read_bytes()[:-1])


def wrong_label_count(path):
    write_idx(path, GREY, compress=False)
    write_idx(path.with_name("labels-idx1-ubyte"), LABELS[:5].astype(np.uint8), compress=False)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("nowhere", break_nothing, "no such file"),
        ("empty", break_empty, "holds no images"),
        ("broken", break_image, "broken image 1.png"),
        ("text", break_text_image, "broken image x.jpg: not a known image format"),
        ("sizes", break_sizes, "different sizes.*--image-size"),
        ("x.zip", lambda p: p.write_bytes(b"PK nonsense"), "not a readable .zip"),
        ("x.npz", lambda p: p.write_bytes(b"nonsense"), "not a readable .npz"),
        ("x.npz", save_npz(pictures=GREY), "array named images, got pictures"),
        ("x.npz", save_npz(images=GREY.astype(np.float32)), "uint8.*got float32"),
        ("x.npz", save_npz(images=COLOUR.transpose(0, 3, 1, 2)), r"got \(20, 3, 6, 5\)"),
        ("x.npz", save_npz(images=GREY[:0]), "holds no images"),
        ("x.npz", save_npz(images=GREY, labels=LABELS[:5]), "labels of shape"),
        ("images-idx3-ubyte", lambda p: p.write_bytes(b"nonsense"), "not an idx file"),
        ("images-idx3-ubyte", cut_idx, "599 bytes follow"),
        ("images-idx3-ubyte", wrong_label_count, "labels of shape"),
        ("images-idx3-ubyte.gz", lambda p: p.write_bytes(b"\x1f\x8bnonsense"), "broken gzip"),
        ("notes.txt", lambda p: p.write_text("hello"), "expected a folder of images"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, name, make, message):
    source = tmp_path / name
    make(source)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(source)
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
