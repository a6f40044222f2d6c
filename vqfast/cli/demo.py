"""`vqfast demo`: handwritten digits from nothing to a report, by the commands that anyone would type."""

import json
import shlex
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from vqfast.cli import run_command
from vqfast.cli.encoding import encode
from vqfast.cli.options import OnDevice, check_out, pick_device
from vqfast.cli.sheets import COLUMNS
from vqfast.data import open_dataset
from vqfast.evaluate.classes import Reader
from vqfast.evaluate.codes import copied
from vqfast.evaluate.figures import Panel, save_curves, save_grid
from vqfast.evaluate.report import Figure, Picture, table, write_report
from vqfast.train import RunError, create_run, load_model, open_run
from vqfast.train.metrics import METRICS_FILE
from vqfast.train.runs import RUN_FILE, read_json, write_json

SAMPLES = 200
LEVELS = 100
PICTURES = {
    "samples": (
        "Samples",
        "Drawn from noise, one row for each class asked for. None of them was chosen: these are the first of each.",
    ),
    "inpainting": (
        "Inpainting",
        "The lower half of held-out digits is hidden and drawn anew, three times each, by the same model without "
        "any training for it. The model is told the class. Hidden pixels are blanked before encoding, so that the "
        "codes carry nothing of them.",
    ),
    "reconstruction": (
        "Reconstruction",
        "Held-out digits above, what is left of them after the codes below.",
    ),
}
REAL_TEXT = "What the models learn from: 8x8 pixels, 16 levels of grey."
CURVES_TEXT = "Lines: training batches (running median). Dots: held-out digits, which are never trained on."


@dataclass(kw_only=True)
class Demo(OnDevice):
    """Train on scikit-learn's handwritten digits, draw new ones, and write a report: a few minutes on a CPU."""

    out: Path = Path("runs/demo")
    """Folder to make: report.html, pictures, metrics.json and the runs."""
    overwrite: bool = False
    """Replace an earlier demo in --out."""
    vqvae_steps: int = 700
    """Training steps of the VQ-VAE."""
    vqddm_steps: int = 1000
    """Training steps of the VQ-DDM."""
    sampling_steps: int = 100
    """Denoising steps of an image, 1..100."""
    seed: int = 0
    """Of everything."""

    def execute(self) -> None:
        threads = torch.get_num_threads()
        # Networks this small gain little from a second thread, and wait long for it where other programs run.
        torch.set_num_threads(1)
        try:
            self._execute()
        finally:
            torch.set_num_threads(threads)

    def _execute(self) -> None:
        # Before minutes are spent on trainings.
        for name in ("vqvae_steps", "vqddm_steps"):
            if getattr(self, name) < 1:
                raise RunError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise RunError(f"--seed: expected at least 0, got {self.seed}")
        if not 1 <= self.sampling_steps <= LEVELS:
            raise RunError(f"--sampling-steps: expected 1..{LEVELS}, the noise levels, got {self.sampling_steps}")
        started = time.perf_counter()
        if (self.out / RUN_FILE).exists():
            earlier = open_run(self.out, "demo").path
            if not self.overwrite:
                raise RunError(f"{self.out}: holds an earlier demo; add --overwrite to replace it")
            shutil.rmtree(earlier)
        check_out(self.out)
        create_run(self.out, "demo", {"seed": self.seed})
        commands = self._commands()
        for number, command in enumerate(commands, 1):
            print(f"\n[{number}/{len(commands)}] {command}", flush=True)
            run_command(shlex.split(command)[1:])
        figures, others = self._measure()
        seconds = time.perf_counter() - started
        self._report(figures, others, commands, seconds)
        print(f"\n{table(figures)}\n")
        print("\n".join(_notes(others)))
        print(f"{seconds:.0f} seconds; open {self.out / 'report.html'}")

    def _commands(self) -> list[str]:
        out = shlex.quote(str(self.out))
        seed = f"--seed {self.seed}"
        device = "" if self.device == "auto" else f" --device {self.device}"
        commands = [
            f"vqfast train vqvae --data digits --out {out}/vqvae --steps {self.vqvae_steps} --batch-size 64 "
            "--lr 2e-3 --warmup 50 --channels 32 --mults 1 2 --num-res-blocks 1 --dropout 0.1 "
            f"--codebook-size 128 --code-dim 16 --eval-every 100 --log-every 10 {seed}",
            f"vqfast train vqddm --vqvae {out}/vqvae --data digits --out {out}/vqddm --steps {self.vqddm_steps} "
            "--batch-size 64 --lr 2e-3 --warmup 50 --ema-decay 0.99 --denoiser transformer --dim 64 --depth 4 "
            f"--heads 4 --timesteps {LEVELS} --eval-every 100 --log-every 10 {seed}",
            f"vqfast reconstruct {out}/vqvae --data digits --out {out}/reconstruction",
            f"vqfast sample {out}/vqddm --out {out}/samples -n {SAMPLES} --steps {self.sampling_steps} "
            f"--guidance 1.5 {seed}",
            f"vqfast inpaint {out}/vqddm --data digits --out {out}/inpainting --mask bottom -n 16 "
            f"--steps {self.sampling_steps} --guidance 1.5 {seed}",
        ]
        return [command + device for command in commands]

    def _measure(self) -> tuple[list[Figure], dict[str, float]]:
        """The figures that have targets, and others."""
        data = open_dataset("digits")
        seen, unseen = data.indices("train"), data.indices("held-out")
        reader = Reader(data.images[seen], data.labels[seen])
        reconstruction = read_json(self.out / "reconstruction" / "metrics.json")
        drawn = np.load(self.out / "samples" / "samples.npz")
        inpainted = np.load(self.out / "inpainting" / "inpainting.npz")
        count, variations = inpainted["results"].shape[:2]
        results = inpainted["results"].reshape(count * variations, *data.images.shape[1:])
        training_codes = encode(load_model(self.out / "vqvae", "vqvae", pick_device(self.device)), data, "train")
        real = reader.agreement(data.images[unseen], data.labels[unseen])
        asked = reader.agreement(drawn["images"], drawn["labels"].astype(int))
        figures = [
            Figure("Reconstruction PSNR, held-out digits", reconstruction["psnr_db"], 20, "dB"),
            Figure("Codebook usage, held-out digits", reconstruction["codebook_usage"], 0.9, "%"),
            Figure("Classifier is right, held-out real digits", real, 0.97, "%"),
            Figure(f"Classifier reads the class asked for, {SAMPLES} samples", asked, 0.85, "%"),
        ]
        return figures, {
            "copied": copied(torch.from_numpy(drawn["codes"]), training_codes),
            "inpainted_read": reader.agreement(results, data.labels[inpainted["indices"]].repeat(variations)),
            "inpainted": count * variations,
            "ssim": reconstruction["ssim"],
            "perplexity": reconstruction["perplexity"],
            "bits_per_code": _last(self.out / "vqddm" / METRICS_FILE, "held_out/bits_per_dim"),
        }

    def _real_digits(self) -> Path:
        """A picture of training digits, laid out as the samples are."""
        data = open_dataset("digits")
        seen = data.indices("train")
        rows = [data.images[seen[data.labels[seen] == label]][:COLUMNS] for label in range(10)]
        path = self.out / "real.png"
        save_grid(path, rows, title="Real digits", subtitle="from the training images", labels=data.classes)
        return path

    def _report(self, figures: list[Figure], others: dict[str, float], commands: list[str], seconds: float) -> None:
        measured = [asdict(figure) | {"verdict": figure.verdict} for figure in figures]
        write_json(self.out / "metrics.json", {"figures": measured, "seconds": round(seconds, 1), "others": others})
        save_curves(
            self.out / "curves.png",
            [
                Panel(
                    "VQ-VAE: reconstruction", self.out / "vqvae" / METRICS_FILE, "reconstruction", "squared error", True
                ),
                Panel("VQ-DDM: bound", self.out / "vqddm" / METRICS_FILE, "bits_per_dim", "bits per code"),
            ],
        )
        for name in PICTURES:
            shutil.copy(self.out / name / f"{name}.png", self.out / f"{name}.png")
        write_report(
            self.out / "report.html",
            title="vqfast demo: handwritten digits",
            introduction="A VQ-VAE turns scikit-learn's 8x8 digits into 4x4 codes out of 128; a VQ-DDM, discrete "
            "diffusion on these codes, then draws digits of a class asked for and completes digits of which a part "
            f"is hidden. Both were trained from scratch, in {seconds:.0f} seconds for everything on this page.",
            figures=figures,
            notes=_notes(others),
            pictures=[Picture("Real digits", REAL_TEXT, self._real_digits())]
            + [Picture(title, text, self.out / f"{name}.png") for name, (title, text) in PICTURES.items()]
            + [Picture("Training", CURVES_TEXT, self.out / "curves.png")],
            commands=commands,
        )


def _notes(others: dict[str, float]) -> list[str]:
    return [
        f"{others['copied']:.1%} of the samples have the codes of a training image, all others are new.",
        f"The classifier reads the right digit in {others['inpainted_read']:.1%} of {others['inpainted']} completed "
        "images, whose class the model is told.",
        f"Held-out digits: SSIM {others['ssim']:.3f}, {others['perplexity']:.0f} codes in even use (perplexity), "
        f"about {others['bits_per_code']:.2f} bits per code by the VQ-DDM's bound.",
    ]


def _last(metrics: Path, name: str) -> float:
    """The last value of a scalar in a metrics.jsonl."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record[name] for record in records if name in record][-1]
