"""ReFiT, VQ-DDM's repair of a codebook of which most codes died (arXiv 2112.01799, section 3.2), and pruning.

Rebuild: cluster vectors that the encoder gives to training images, before quantisation; the centres are the codes.
Fine-tune: train the decoder and the codebook on, with the encoder as it is. `rebuild_codebook` does the first and
returns a model configured for the second, which is a training like any other.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from vqfast.models.autoencoder import Autoencoder, AutoencoderConfig
from vqfast.models.vqgan import VQGANConfig
from vqfast.nn.codebook import kmeans

GENERATOR_WEIGHT = 0.8  # fixed: the released fine-tuning does not balance gradients


@torch.no_grad()
def collect_vectors(
    model: Autoencoder, batches: Iterable[Tensor], *, generator: torch.Generator | None = None
) -> Tensor:
    """One vector of each image, from a cell of the code grid drawn at random, as it is before quantisation.

    One each, so that no image counts for more than another and neighbouring cells, which are alike, do not crowd.

    Args:
        model: in eval mode.
        batches: images (B, C, H, W) on the model's device; the released code draws 20,000 with replacement.
        generator: of the cells, on the CPU.

    Returns:
        (N, code_dim), on the model's device.
    """
    vectors = []
    for images in batches:
        features = model.features(images).flatten(2)  # (B, D, h * w)
        cells = torch.randint(features.shape[2], (len(features),), generator=generator).to(features.device)
        vectors.append(features.take_along_dim(cells[:, None, None], dim=2)[..., 0])
    return torch.cat(vectors)


def rebuild_codebook(
    model: Autoencoder,
    vectors: Tensor,
    codebook_size: int,
    *,
    iters: int = 100,
    generator_weight: float = GENERATOR_WEIGHT,
    generator: torch.Generator | None = None,
) -> Autoencoder:
    """A model whose codes are the centres of k-means over the vectors, from an AFK-MC2 start; the old ones are gone.

    Args:
        model: stays as it is.
        vectors: (N, code_dim), from `collect_vectors`; many more than codebook_size.
        codebook_size: of the new model.
        iters: of k-means.
        generator_weight: of a VQGAN's fine-tuning.
        generator: of its start, on the device of vectors.

    Returns:
        Autoencoder of the class of `model`, its encoder frozen, to fine-tune: a VQGAN with the released loss,
        mean(L1 + LPIPS where there is one) + generator_weight * generator's loss + codebook loss. In eval mode.

    Raises:
        ValueError: fewer vectors than codes.
    """
    if len(vectors) < codebook_size:
        raise ValueError(f"vectors: expected at least one for each of {codebook_size} codes, got {len(vectors)}")
    centres, counts = kmeans(vectors, codebook_size, iters=iters, sync=False, generator=generator)
    counts = counts.clamp(min=1)
    quantizer = {
        "codebook": centres,
        "cluster_size": counts,
        "embed_avg": centres * counts[:, None],
        "idle": torch.zeros(codebook_size, dtype=torch.int64),
        "initialised": torch.tensor(True),
    }
    return _with_codes(model, _to_fine_tune(model.config, codebook_size, generator_weight), quantizer)


def prune_codebook(model: Autoencoder, counts: Tensor) -> tuple[Autoencoder, Tensor]:
    """Drop the codes that are not used.

    Args:
        model: stays as it is.
        counts: (K,) how often each code occurs in the images that matter.

    Returns:
        the model with the codes of counts above 0, in their order, in eval mode: images that only use these keep them,
        and their reconstruction; kept: (K',) int64, the old index of each new code.

    Raises:
        ValueError: counts of another number of codes, or no code used.
    """
    size = model.config.codebook_size
    if counts.shape != (size,):
        raise ValueError(f"counts: expected shape {(size,)}, one for each code, got {tuple(counts.shape)}")
    kept = counts.nonzero()[:, 0]
    if len(kept) == 0:
        raise ValueError("counts: expected a code with a count above 0, got none")
    quantizer = {
        name: value[kept.to(value.device)] if value.shape[:1] == (size,) else value
        for name, value in model.quantizer.state_dict().items()
    }
    return _with_codes(model, replace(model.config, codebook_size=len(kept)), quantizer), kept


def remap_codes(codes: Tensor, kept: Tensor) -> Tensor:
    """Codes (...) of the old codebook as codes of the pruned one; -1 where the code was dropped."""
    table = torch.full((max(int(kept.max()), int(codes.max())) + 1,), -1, device=codes.device)
    table[kept.to(codes.device)] = torch.arange(len(kept), device=codes.device)
    return table[codes]


def _to_fine_tune(config: AutoencoderConfig, codebook_size: int, generator_weight: float) -> AutoencoderConfig:
    changes = dict(codebook_size=codebook_size, freeze_encoder=True)
    if isinstance(config, VQGANConfig):
        changes |= dict(adaptive_disc_weight=False, disc_weight=generator_weight, disc_start=0)
    return replace(config, **changes)


def _with_codes(model: Autoencoder, config: AutoencoderConfig, quantizer: dict[str, Tensor]) -> Autoencoder:
    """A model like this one but for its quantiser's state."""
    rebuilt = type(model)(config)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("quantizer.")}
    rebuilt.load_state_dict(state | {f"quantizer.{name}": value for name, value in quantizer.items()})
    if hasattr(model, "perceptual"):
        rebuilt.perceptual = model.perceptual
    return rebuilt.to(next(model.parameters()).device).eval()
