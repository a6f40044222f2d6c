"""Image collections that Hugging Face's `datasets` saved to disk (`Dataset.save_to_disk`)."""

from pathlib import Path

import numpy as np

from vqfast.data.errors import DataError
from vqfast.data.members import Members


def is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


class _Column:
    def __init__(self, column):
        self._column = column

    def __call__(self, i: int) -> bytes:
        image = self._column[i]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def dataset_members(folder: Path) -> Members:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{folder}: a Hugging Face dataset needs the package datasets (pip install datasets)"
        ) from error
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: not a readable dataset: {' '.join(str(error).split())}") from error
    if isinstance(saved, datasets.DatasetDict):
        raise DataError(
            f"{folder}: holds the splits {', '.join(saved)}: name the folder of one, such as {folder}/train"
        )
    images = [name for name, kind in saved.features.items() if isinstance(kind, datasets.Image)]
    if len(images) != 1:
        found = ", ".join(saved.features) or "none"
        raise DataError(f"{folder}: expected one column of images, got {len(images)} among {found}")
    kinds = {name: kind for name, kind in saved.features.items() if isinstance(kind, datasets.ClassLabel)}
    labels = None
    if len(kinds) == 1:
        ((name, kind),) = kinds.items()
        labels = np.array(kind.int2str(list(saved[name])))
    column = saved.cast_column(images[0], datasets.Image(decode=False))[images[0]]
    names = [f"row {i}" for i in range(len(saved))]
    return Members(str(folder), names, _Column(column), labels)
