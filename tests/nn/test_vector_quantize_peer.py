"""`VectorQuantize` and that of vector-quantize-pytorch side by side, for every option that they share."""

import pytest
import torch

from tests.nn.test_vector_quantize import SIZES, codes_like
from vqfast.nn import VectorQuantize


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


CLOSE = dict(rtol=1e-5, atol=1e-5)


def pair(options: dict) -> tuple[VectorQuantize, torch.nn.Module]:
    """Ours and the peer's, which rotates gradients unless told not to, with the same codes and projections."""
    library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    ours = VectorQuantize(**SIZES | options)
    peer = library.VectorQuantize(**{"rotation_trick": False} | SIZES | options)
    codes = codes_like(ours.codebook, ours.use_cosine_sim)
    ours.load_state_dict({"codebook": codes, "embed_avg": codes}, strict=False)
    for buffer in (peer._codebook.embed, peer._codebook.embed_avg):
        buffer.data.copy_(codes.view_as(buffer))
    for projection in ("project_in", "project_out"):
        getattr(peer, projection).load_state_dict(getattr(ours, projection).state_dict())
    return ours, peer


def assert_same_codebook(ours: VectorQuantize, peer: torch.nn.Module) -> None:
    for mine, theirs in (("codebook", "embed"), ("cluster_size", "cluster_size"), ("embed_avg", "embed_avg")):
        expected = getattr(peer._codebook, theirs)
        if mine != "codebook" and ours.learnable_codebook:
            continue  # ours keep count of usage
        torch.testing.assert_close(getattr(ours, mine), expected.view_as(getattr(ours, mine)), **CLOSE)


SHARED_OPTIONS = [
    dict(decay=0.8, commitment_weight=0.7, eps=1e-5),
    dict(commitment_weight=0.0),
    dict(decay=0.99, eps=1e-3),
    dict(codebook_dim=4),
    dict(codebook_dim=4, layernorm_after_project_in=True),
    dict(heads=2),
    dict(heads=2, codebook_dim=4),
    dict(heads=2, codebook_dim=4, separate_codebook_per_head=True),
    dict(heads=3, codebook_dim=5, separate_codebook_per_head=True, commitment_weight=0.25),
    dict(use_cosine_sim=True),
    dict(use_cosine_sim=True, heads=2, codebook_dim=4),
    dict(use_cosine_sim=True, heads=4, codebook_dim=3, separate_codebook_per_head=True),
    dict(learnable_codebook=True, ema_update=False),
    dict(learnable_codebook=True, ema_update=False, commitment_weight=0.3, heads=2, separate_codebook_per_head=True),
    dict(learnable_codebook=False, ema_update=False),
    dict(orthogonal_reg_weight=0.5),
    dict(orthogonal_reg_weight=10.0, learnable_codebook=True, ema_update=False),
    dict(orthogonal_reg_weight=0.5, orthogonal_reg_active_codes_only=True, heads=2, codebook_dim=4),
    dict(orthogonal_reg_weight=0.5, heads=2, codebook_dim=4, separate_codebook_per_head=True),
    dict(orthogonal_reg_weight=0.5, orthogonal_reg_max_codes=32),
    # The peer's gradient of the cross entropy reads the codebook after it has moved: frozen or learnable ones only.
    dict(commitment_use_cross_entropy_loss=True, freeze_codebook=True),
    dict(commitment_use_cross_entropy_loss=True, heads=2, codebook_dim=4, learnable_codebook=True, ema_update=False),
    dict(commitment_use_cross_entropy_loss=True, use_cosine_sim=True, commitment_weight=0.3, freeze_codebook=True),
    dict(rotation_trick=True),
    dict(rotation_trick=True, heads=2, codebook_dim=4, use_cosine_sim=True),
    dict(stochastic_sample_codes=True, sample_codebook_temp=0.0),
    dict(manual_ema_update=True),
    dict(sync_codebook=False, sync_kmeans=False),
    dict(freeze_codebook=True),
    dict(channel_last=False),
    dict(accept_image_fmap=True, heads=2, codebook_dim=4),
    dict(accept_3d_fmap=True),
]


def input_shape(options: dict) -> tuple[int, ...]:
    if options.get("accept_image_fmap"):
        return (3, 8, 6, 5)
    if options.get("accept_3d_fmap"):
        return (3, 8, 2, 3, 5)
    return (3, 8, 30) if options.get("channel_last") is False else (3, 30, 8)


class TestSideBySide:
    """Both libraries on the same inputs for several training steps, then in eval mode."""

    @pytest.mark.parametrize("options", SHARED_OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
    def test_trains_alike(self, options):
        ours, peer = pair(options)
        optimisers = [
            torch.optim.SGD(parameters, 0.01)
            for parameters in (list(ours.parameters()), list(peer.parameters()))
            if parameters
        ]
        for step in range(4):
            x = torch.randn(input_shape(options))
            mine, theirs = (x.clone().requires_grad_() for _ in range(2))
            quantized, indices, loss, parts = ours(mine, return_loss_breakdown=True)
            expected, expected_indices, expected_loss, expected_parts = peer(theirs, return_loss_breakdown=True)
            assert torch.equal(indices, expected_indices), f"step {step}"
            torch.testing.assert_close(quantized, expected, **CLOSE)
            torch.testing.assert_close(loss, expected_loss.view(()), **CLOSE)
            for part in parts._fields:
                torch.testing.assert_close(getattr(parts, part), getattr(expected_parts, part).view(()), **CLOSE)
            weight = torch.randn_like(x) / 8
            ((quantized * weight).sum() + loss).backward()
            ((expected * weight).sum() + expected_loss).backward()
            torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            if options.get("manual_ema_update") and step == 2:
                ours.update_ema(), peer._codebook.update_ema()
            assert_same_codebook(ours, peer)
        ours.eval(), peer.eval()
        for mine, theirs in zip(ours(x), peer(x), strict=True):
            torch.testing.assert_close(mine, theirs.view_as(mine), **CLOSE)
        if ours.heads > 1 and not ours.separate_codebook_per_head:
            return  # the peer leaves heads apart here, and its get_output_from_indices fails
        torch.testing.assert_close(ours.get_codes_from_indices(indices), peer.get_codes_from_indices(indices), **CLOSE)
        expected = peer.get_output_from_indices(indices)
        torch.testing.assert_close(ours.get_output_from_indices(indices), expected, **CLOSE)

    @pytest.mark.parametrize("given", ["mask", "lens"])
    @pytest.mark.parametrize("zeros", [True, False])
    @pytest.mark.parametrize(
        "options",
        [dict(), dict(commitment_use_cross_entropy_loss=True, freeze_codebook=True), dict(rotation_trick=True)],
    )
    def test_masked_alike(self, options, given, zeros):
        ours, peer = pair(options | dict(return_zeros_for_masked_padding=zeros))
        for _ in range(3):
            x = torch.randn(3, 30, 8)
            keep = torch.rand(3, 30) < 0.6 if given == "mask" else torch.randint(5, 30, (3,))
            mine, theirs = (x.clone().requires_grad_() for _ in range(2))
            quantized, indices, loss = ours(mine, **{given: keep})
            expected, expected_indices, expected_loss = peer(theirs, **{given: keep})
            assert torch.equal(indices, expected_indices)
            torch.testing.assert_close(quantized, expected, **CLOSE)
            torch.testing.assert_close(loss, expected_loss.view(()), **CLOSE)
            weight = torch.randn_like(x) / 8
            ((quantized * weight).sum() + loss).backward()
            ((expected * weight).sum() + expected_loss).backward()
            torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
            assert_same_codebook(ours, peer)

    @pytest.mark.parametrize("options", [dict(), dict(heads=2, codebook_dim=4, separate_codebook_per_head=True)])
    def test_accumulates_alike(self, options):
        ours, peer = pair(options)
        for step in range(7):
            x = torch.randn(3, 30, 8)
            wait = step % 3 != 2
            ours(x, accum_ema_update=wait), peer(x, accum_ema_update=wait)
            assert_same_codebook(ours, peer)

    @pytest.mark.parametrize("kind", ["tensor", "function"])
    @pytest.mark.parametrize("options", [dict(), dict(heads=2, codebook_dim=4, separate_codebook_per_head=True)])
    def test_weighs_the_averages_alike(self, options, kind):
        ours, peer = pair(options)
        for _ in range(3):
            x, factor = torch.randn(3, 30, 8), torch.rand(ours.cluster_size.shape)
            if kind == "function":
                factor = lambda sums, counts: 1 / (1 + counts)
            ours(x, ema_update_weight=factor), peer(x, ema_update_weight=factor)
            assert_same_codebook(ours, peer)

    @pytest.mark.parametrize(
        "options",
        [
            dict(learnable_codebook=True, ema_update=False),
            dict(use_cosine_sim=True, freeze_codebook=True),
            dict(heads=2, codebook_dim=4, freeze_codebook=True),
            dict(heads=2, codebook_dim=4, separate_codebook_per_head=True, learnable_codebook=True, ema_update=False),
        ],
    )
    def test_cross_entropy_of_given_indices_alike(self, options):
        ours, peer = pair(options)
        x = torch.randn(3, 30, 8)
        indices = torch.randint(-1, 32, (3, 30, 2) if ours.heads > 1 else (3, 30))
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        quantized, loss = ours(mine, indices)
        expected, expected_loss = peer(theirs, indices)
        if ours.heads == 1:  # the peer leaves heads apart here
            torch.testing.assert_close(quantized, expected, **CLOSE)
        torch.testing.assert_close(loss, expected_loss, **CLOSE)
        loss.backward(), expected_loss.backward()
        torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
        if ours.learnable_codebook:
            grad = peer._codebook.embed.grad.view_as(ours.codebook)
            torch.testing.assert_close(ours.codebook.grad, grad, **CLOSE)
        else:
            assert_same_codebook(ours, peer)

    def test_the_peer_draws_from_the_same_distribution(self):
        ours, peer = pair(dict(stochastic_sample_codes=True, sample_codebook_temp=0.7, codebook_size=6))
        x, draws = torch.randn(8), 20_000
        counts = [
            vq(x.expand(1, draws, 8), freeze_codebook=True)[1].flatten().bincount(minlength=6).double()
            for vq in (ours, peer)
        ]
        # Chi-square of two samples with 5 degrees of freedom: 30 is exceeded once in 70,000 times.
        assert ((counts[0] - counts[1]) ** 2 / (counts[0] + counts[1])).sum() < 30
