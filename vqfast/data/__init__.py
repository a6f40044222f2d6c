"""Image collections: one reader for folders, archives, arrays and named sets, with a fixed held-out part."""

from vqfast.data.batches import CodeBatches, ImageBatches, ShuffledSteps, to_float, to_uint8
from vqfast.data.errors import DataError
from vqfast.data.images import ImageData
from vqfast.data.sources import open_dataset

__all__ = [
    "CodeBatches",
    "DataError",
    "ImageBatches",
    "ImageData",
    "ShuffledSteps",
    "open_dataset",
    "to_float",
    "to_uint8",
]
