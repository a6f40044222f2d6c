"""Feature extractors: what they are given, what they give, and one line for files that are none."""

import sys

import pytest
import torch

from vqfast.evaluate.features import InceptionFeatures, TimmFeatures, TorchScriptFeatures

IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Means(torch.nn.Module):
    def forward(self, x):
        return x.float().mean(dim=(2, 3))


class Both(torch.nn.Module):
    def forward(self, x):
        features = x.float().flatten(1)
        return features, features[:, :5]


class Maps(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.fixture
def scripted(tmp_path):
    def save(module):
        torch.jit.script(module).save(str(tmp_path / "net.pt"))
        return tmp_path / "net.pt"

    return save


@pytest.mark.parametrize("values", ["0..1", "-1..1", "0..255", "uint8"])
def test_a_torchscript_file_gets_the_values_it_asks_for(scripted, values):
    found = TorchScriptFeatures(scripted(Means()), "cpu", values=values)(IMAGES)
    grey = IMAGES.expand(-1, 3, -1, -1)
    expected = {
        "0..1": (grey + 1) / 2,
        "-1..1": grey,
        "0..255": (grey + 1) * 127.5,
        "uint8": ((grey + 1) * 127.5).round(),
    }[values].mean(dim=(2, 3))
    torch.testing.assert_close(found.features, expected)
    assert found.logits is None


def test_it_may_give_logits_and_ask_for_a_size(scripted):
    found = TorchScriptFeatures(scripted(Both()), "cpu", size=4)(IMAGES)
    assert found.features.shape == (2, 48) and found.logits.shape == (2, 5)


def test_files_that_are_none_are_named(scripted, tmp_path):
    (tmp_path / "text.pt").write_text("no network")
    for name in ("text.pt", "nowhere.pt"):
        with pytest.raises(ValueError, match=f"{name}: not a readable TorchScript file: "):
            TorchScriptFeatures(tmp_path / name, "cpu")
    with pytest.raises(ValueError, match=r"net.pt: expected features \(2, D\) of so many images, got \(2, 3, 8, 8\)"):
        TorchScriptFeatures(scripted(Maps()), "cpu")(IMAGES)
    with pytest.raises(ValueError, match=r"net.pt: fails on images \(2, 3, 8, 8\): "):
        TorchScriptFeatures(scripted(torch.nn.Linear(5, 2)), "cpu")(IMAGES)


def test_inception_is_torch_fidelitys_with_the_weights_of_a_file(tmp_path, monkeypatch):
    inception = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed"
    )
    network = inception.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # the only way to one without its weights
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        expected = network("inception-v3-compat", ["2048", "logits_unbiased"])
    torch.save(expected.state_dict(), tmp_path / "weights.pth")
    found = InceptionFeatures(tmp_path / "weights.pth", "cpu")(IMAGES)
    pixels = ((IMAGES.expand(-1, 3, -1, -1) + 1) * 127.5).round().to(torch.uint8)
    for ours, theirs in zip(found, expected(pixels), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found.features.shape == (2, 2048) and found.logits.shape == (2, 1008)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="text.pth: not the weights of torch-fidelity's Inception: "):
        InceptionFeatures(tmp_path / "text.pth", "cpu")
    with pytest.raises(OSError):
        InceptionFeatures(tmp_path / "nowhere.pth", "cpu")


def test_timms_features_and_logits(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    network = timm.create_model("resnet10t", pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    found = TimmFeatures("resnet10t", tmp_path / "weights.pth", "cpu")(IMAGES)
    assert found.features.shape == (2, network.num_features) and found.logits.shape == (2, 1000)
    torch.testing.assert_close(network.fc(found.features), found.logits)
    with pytest.raises(ValueError, match="not the weights of timm's resnet18"):
        TimmFeatures("resnet18", tmp_path / "weights.pth", "cpu")


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("torch_fidelity", lambda path: InceptionFeatures(path, "cpu")),
        ("timm", lambda path: TimmFeatures("resnet10t", path, "cpu")),
    ],
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.feature_extractor_inceptionv3", raising=False)
    with pytest.raises(ValueError, match=f"needs the package {package.replace('_', '-')}"):
        make(tmp_path / "weights.pth")
