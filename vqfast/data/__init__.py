"""Image collections: one reader for folders, archives, shards and arrays, with a fixed held-out part; their latents."""

from vqfast.data.batches import CodeBatches, ImageBatches, ShuffledSteps, read_ahead, to_device, to_float, to_uint8
from vqfast.data.errors import DataError
from vqfast.data.images import ImageData
from vqfast.data.latents import cached_latents, fingerprint
from vqfast.data.sources import open_dataset

__all__ = [
    "CodeBatches",
    "DataError",
    "ImageBatches",
    "ImageData",
    "ShuffledSteps",
    "cached_latents",
    "fingerprint",
    "open_dataset",
    "read_ahead",
    "to_device",
    "to_float",
    "to_uint8",
]
