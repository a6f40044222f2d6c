"""The site builds without a warning, and every public name and every op has its place in it."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vqfast.ops", "vqfast.nn", "vqfast.diffusion", "vqfast.train", "vqfast.data", "vqfast.evaluate")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_public_name_is_in_the_reference(site):
    pages = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    described = set(re.findall(r'id="(vqfast\.[\w.]+)"', pages))
    # vqfast.diffusion hands these on from vqfast.ops.
    families = {"Uniform", "Absorbing", "MaskAndReplace", "Marginal", "Gaussian", "Nearest", "SymmetricRate", "Dense"}
    documented_elsewhere = families | {"Transition", "prior_kl"}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            if not callable(getattr(module, name)) or (package != "vqfast.ops" and name in documented_elsewhere):
                continue
            assert f"{package}.{name}" in described, f"{package}.{name} has no entry in docs/reference"


def test_every_model_is_in_the_reference(site):
    page = (site / "reference" / "models.html").read_text()
    for module in sorted((ROOT / "vqfast" / "models").glob("*.py")):
        if module.stem != "__init__":
            assert f'id="vqfast.models.{module.stem}"' in page, f"docs/reference/models.md lacks {module.stem}"


def test_every_op_has_a_page(site):
    for readme in sorted((ROOT / "kernels").glob("*/README.md")):
        page = site / "kernels" / f"{readme.parent.name}.html"
        assert page.is_file(), f"docs/kernels lacks {readme.parent.name}.md"
        title = readme.read_text().splitlines()[0].removeprefix("# ").partition(":")[0]
        assert f">{title}" in page.read_text(), readme.parent.name
