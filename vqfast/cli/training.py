"""`vqfast train vqvae` and `vqfast train vqddm`."""

import shutil
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from vqfast.data import CodeBatches, DataError, ImageBatches, ImageData, open_dataset
from vqfast.models.vqddm import VQDDM, VQDDMConfig
from vqfast.models.vqvae import VQVAE, VQVAEConfig
from vqfast.train import RunError, TrainConfig, check_new, create_run, load_model, open_run, train
from vqfast.train.checkpoint import INDEX, WEIGHTS, newest_checkpoint
from vqfast.train.config import FREE_ON_RESUME
from vqfast.train.runs import RUN_FILE, write_json

AUTOENCODER = "vqvae"  # folder of a VQ-DDM run that holds its VQ-VAE, so that the run stands alone


@dataclass
class TrainVQVAE:
    """Train a VQ-VAE: images to a small grid of codes and back."""

    data: str
    """Folder of images, .zip, .npz, idx or idx.gz file, or digits."""
    out: Path
    """Folder of the run; made, and never overwritten."""
    image_size: int | None = None
    """Resize and crop all images to this many pixels a side. Default: their own size."""
    channels: int = 64
    """Base width of the network; a multiple of 32."""
    mults: tuple[int, ...] | None = None
    """Width of each level as a multiple of the base; each level after the first halves the resolution.
    Default: chosen by the image size."""
    num_res_blocks: int = 2
    """Residual blocks a level."""
    attention_resolutions: tuple[int, ...] = ()
    """Resolutions in pixels at which all positions attend to each other."""
    dropout: float = 0.0
    """In the residual blocks; helps where there are few images."""
    codebook_size: int = 512
    """Number of codes."""
    code_dim: int = 64
    """Size of a code."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss."""
    reconstruction_loss: Literal["l2", "l1"] = "l2"
    """How images are compared."""
    resume: bool = False
    """Go on where the run in --out stopped: the same command with this added."""
    training: TrainConfig = field(default_factory=TrainConfig)

    def execute(self) -> None:
        processes = PartialState(cpu=self.training.device == "cpu")
        if processes.is_main_process and not self.resume:
            check_new(self.out)
        data = open_dataset(self.data, image_size=self.image_size)
        height, width = data.image_size
        if height != width:
            raise DataError(f"{self.data}: images of {width}x{height} pixels: choose a square with --image-size")
        config = VQVAEConfig(
            image_size=height,
            in_channels=data.channels,
            channels=self.channels,
            mults=self.mults or _mults(height),
            num_res_blocks=self.num_res_blocks,
            attention_resolutions=self.attention_resolutions,
            dropout=self.dropout,
            codebook_size=self.codebook_size,
            code_dim=self.code_dim,
            commitment_weight=self.commitment_weight,
            reconstruction_loss=self.reconstruction_loss,
        )
        torch.manual_seed(self.training.seed)
        model = VQVAE(config)
        images, held_out = ImageBatches(data), _held_out_images(data)
        info = {"model": asdict(config), "data": describe(data), "training": asdict(self.training)}
        if processes.is_main_process:
            _begin(self.out, "vqvae", info, self.resume)
        processes.wait_for_everyone()
        train(model, images, self.training, self.out, held_out=held_out, resume=self.resume)
        processes.print(f"{self.out}: trained a VQ-VAE for {self.training.steps} steps on {len(images)} images")


@dataclass
class TrainVQDDM:
    """Train a VQ-DDM: discrete diffusion on the codes that a trained VQ-VAE gives to images."""

    vqvae: Path
    """Run of the VQ-VAE."""
    data: str
    """Images to model: see vqfast train vqvae."""
    out: Path
    """Folder of the run; made, and never overwritten."""
    unconditional: bool = False
    """Leave out the classes even where the data has them."""
    denoiser: Literal["unet", "transformer"] = "unet"
    """Network that predicts the clean codes."""
    dim: int = 128
    """Base width of the network."""
    mults: tuple[int, ...] | None = None
    """U-Net: width of each level as a multiple of the base. Default: chosen by the code grid."""
    depth: int = 12
    """Transformer: number of blocks."""
    heads: int = 8
    """Transformer: attention heads."""
    timesteps: int = 1000
    """Noise levels T."""
    schedule: Literal["cosine", "cosine_released", "linear"] = "cosine"
    """How the noise grows with the level."""
    class_dropout: float = 0.1
    """Share of labels hidden in training, which --guidance and sampling without a class need."""
    aux_weight: float = 0.0
    """Weight of the cross-entropy of the clean codes beside the variational bound."""
    resume: bool = False
    """Go on where the run in --out stopped: the same command with this added."""
    training: TrainConfig = field(default_factory=lambda: TrainConfig(ema_decay=0.999))

    def execute(self) -> None:
        processes = PartialState(cpu=self.training.device == "cpu")
        if processes.is_main_process and not self.resume:
            check_new(self.out)
        autoencoder: VQVAE = load_model(self.vqvae, "vqvae")
        data = open_dataset(self.data, image_size=autoencoder.config.image_size)
        check_channels(data, autoencoder)
        grid = (autoencoder.config.grid_size,) * 2
        conditional = data.labels is not None and not self.unconditional
        config = VQDDMConfig(
            codebook_size=autoencoder.config.codebook_size,
            grid=grid,
            denoiser=self.denoiser,
            dim=self.dim,
            mults=self.mults or _halvings(grid[0]),
            depth=self.depth,
            heads=self.heads,
            T=self.timesteps,
            schedule=self.schedule,
            num_classes=len(data.classes) if conditional else None,
            class_dropout=self.class_dropout,
            aux_weight=self.aux_weight,
        )
        torch.manual_seed(self.training.seed)
        model = VQDDM(config)
        weights = newest_checkpoint(self.vqvae).path
        info = {
            "model": asdict(config),
            "data": describe(data),
            "vqvae": {"weights": zlib.crc32((weights / WEIGHTS).read_bytes())},
            "training": asdict(self.training),
        }
        if processes.is_main_process:
            _begin(self.out, "vqddm", info, self.resume)
            _copy_autoencoder(self.vqvae, weights, self.out / AUTOENCODER)
        processes.wait_for_everyone()

        device = pick_device(self.training.device)
        autoencoder.to(device)
        codes = CodeBatches(encode(autoencoder, data, "train"), _labels(data, "train"))
        held_out = None
        if data.held_out.any():
            held_out = CodeBatches(encode(autoencoder, data, "held-out"), _labels(data, "held-out"))
        train(model, codes, self.training, self.out, held_out=held_out, resume=self.resume)
        processes.print(f"{self.out}: trained a VQ-DDM for {self.training.steps} steps on {len(codes)} encoded images")


def encode(autoencoder: VQVAE, data: ImageData, split: str) -> Tensor:
    """Codes of a split of the data: (N, h, w) int64 on the CPU."""
    batches = ImageBatches(data, split)
    device = next(autoencoder.parameters()).device
    codes = []
    with torch.no_grad():
        for positions in tqdm(
            torch.arange(len(batches)).split(256), desc=f"encoding {split}", unit="batch", leave=False
        ):
            codes.append(autoencoder.encode(batches[positions.numpy()]["image"].to(device)).cpu())
    return torch.cat(codes)


def check_channels(data: ImageData, autoencoder: VQVAE) -> None:
    """Raises DataError where grey images meet a model of coloured ones, or the other way round."""
    expected = autoencoder.config.in_channels
    if data.channels != expected:
        names = {1: "grey", 3: "coloured"}
        raise DataError(f"{data.source}: {names[data.channels]} images, but the VQ-VAE takes {names[expected]} ones")


def describe(data: ImageData) -> dict[str, Any]:
    """What run.json says of the data: enough to see that it is the same."""
    return {
        "source": data.source,
        "images": len(data),
        "image_size": data.image_size[0],
        "channels": data.channels,
        "classes": list(data.classes),
        "checksum": zlib.crc32(data.keys.tobytes()),
    }


def pick_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")


def _begin(out: Path, kind: str, info: dict[str, Any], resume: bool) -> None:
    """Make the run, or make sure that the one to resume was started with the same settings."""
    if not resume:
        create_run(out, kind, info)
        return
    run = open_run(out, kind)
    for section, settings in info.items():
        for name, value in settings.items():
            free = section == "training" and name in FREE_ON_RESUME
            before = run.info.get(section, {}).get(name)
            # Through JSON, as the recorded value came.
            if not free and before != (list(value) if isinstance(value, tuple) else value):
                raise RunError(f"{out}: was started with {section} {name} = {before}, now it is {value}")
    write_json(run.path / RUN_FILE, {"kind": kind} | run.info | info)


def _copy_autoencoder(run: Path, weights: Path, target: Path) -> None:
    if target.exists():
        return
    folder = target.with_name(f".{target.name}")
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder / weights.relative_to(run)
    checkpoint.mkdir(parents=True)
    shutil.copy(run / RUN_FILE, folder)
    for name in (WEIGHTS, INDEX):
        shutil.copy(weights / name, checkpoint)
    folder.rename(target)


def _held_out_images(data: ImageData) -> ImageBatches | None:
    return ImageBatches(data, "held-out") if data.held_out.any() else None


def _labels(data: ImageData, split: str) -> Tensor | None:
    return None if data.labels is None else torch.from_numpy(data.labels[data.indices(split)])


def _mults(image_size: int) -> tuple[int, ...]:
    """Levels that leave a grid of about 4 to 16 codes a side."""
    if image_size <= 16:
        return (1, 2)
    if image_size <= 64:
        return (1, 2, 2)
    if image_size <= 128:
        return (1, 2, 2, 4)
    return (1, 1, 2, 2, 4)


def _halvings(grid: int) -> tuple[int, ...]:
    """Levels of the U-Net, as many of the paper's four as the grid can be halved for."""
    mults = (1, 2, 4, 8)
    levels = 1
    while levels < len(mults) and grid % 2**levels == 0:
        levels += 1
    return mults[:levels]
