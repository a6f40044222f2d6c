"""Checkpoints of vector-quantize-pytorch load as they are, and training goes on as it would have there."""

import pytest
import torch

import vqfast.nn

CLOSE = dict(rtol=1e-5, atol=1e-5)
SIZES = dict(dim=8, codebook_size=16, rotation_trick=False)
STAGES = SIZES | dict(num_quantizers=3)
KEPT = {
    "VectorQuantize": [
        SIZES,
        SIZES | dict(kmeans_init=True),
        SIZES | dict(learnable_codebook=True, ema_update=False),
        SIZES | dict(heads=2, codebook_dim=3),
        SIZES | dict(heads=2, codebook_dim=3, separate_codebook_per_head=True, use_cosine_sim=True),
        SIZES | dict(codebook_dim=1, codebook_size=1),
    ],
    "ResidualVQ": [STAGES, STAGES | dict(codebook_dim=4, shared_codebook=True), STAGES | dict(kmeans_init=True)],
    "GroupedResidualVQ": [STAGES | dict(groups=2, shared_codebook=True)],
    "FSQ": [dict(levels=[8, 5, 5], dim=8)],
    "LFQ": [dict(codebook_size=16, dim=8), dict(codebook_size=256)],
    "SimVQ": [dict(dim=8, codebook_size=16, rotation_trick=False)],
}


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, several in KEPT.items() for options in several]
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_checkpoint_of_the_peer_loads_and_training_goes_on(name, options, inside):
    library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    torch.manual_seed(0)
    ours, peer = (getattr(module, name)(**options) for module in (vqfast.nn, library))
    for _ in range(3):
        peer(torch.randn(4, 30, 8))
    if inside:  # a module of a model
        torch.nn.Sequential(torch.nn.ReLU(), ours).load_state_dict(
            torch.nn.Sequential(torch.nn.ReLU(), peer).state_dict()
        )
    else:
        ours.load_state_dict(peer.state_dict())
    for training in (True, True, False):
        ours.train(training), peer.train(training)
        x = torch.randn(4, 30, 8)
        (quantized, indices, *_), (expected, expected_indices, *_) = ours(x), peer(x)
        assert torch.equal(indices, expected_indices.long())
        torch.testing.assert_close(quantized, expected, **CLOSE)


def test_what_is_saved_here_loads_here_and_a_wrong_size_is_named():
    vq, other = vqfast.nn.VectorQuantize(8, 16), vqfast.nn.VectorQuantize(8, 16)
    vq(torch.randn(4, 30, 8))
    assert not any("_codebook" in name for name in vq.state_dict())
    other.load_state_dict(vq.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in vq.state_dict().items())
    peers = {"embed": torch.zeros(1, 17, 8), "embed_avg": torch.zeros(1, 17, 8), "cluster_size": torch.zeros(1, 17)}
    with pytest.raises(RuntimeError, match="size mismatch for codebook"):
        vq.load_state_dict({f"_codebook.{name}": value for name, value in peers.items()}, strict=False)
