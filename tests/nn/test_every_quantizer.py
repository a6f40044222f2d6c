"""What every quantiser does with input that is none, with padding, of any precision, compiled, on the meta device."""

import pytest
import torch

from vqfast.nn import FSQ, LFQ, GroupedResidualVQ, ResidualVQ, SimVQ, VectorQuantize


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


EVERY_QUANTISER = {
    "VectorQuantize": lambda: VectorQuantize(8, 16),
    "images": lambda: VectorQuantize(8, 16, accept_image_fmap=True),
    "ResidualVQ": lambda: ResidualVQ(dim=8, num_quantizers=2, codebook_size=16),
    "GroupedResidualVQ": lambda: GroupedResidualVQ(dim=8, groups=2, num_quantizers=2, codebook_size=16),
    "FSQ": lambda: FSQ([8, 5, 5], dim=8),
    "LFQ": lambda: LFQ(codebook_size=16, dim=8, entropy_loss_weight=0.1),
    "SimVQ": lambda: SimVQ(8, 16),
}


@pytest.mark.parametrize("name", EVERY_QUANTISER)
@pytest.mark.parametrize(
    "x", [torch.ones(2, 8, 4, 8, dtype=torch.uint8), torch.ones(2, 8, 4, 8, dtype=torch.complex64), [1.0], None]
)
def test_what_is_no_float_tensor_is_named_rather_than_rounded(name, x):
    with pytest.raises(TypeError, match="^x: expected a float64, float32, bfloat16 or float16 tensor, got "):
        EVERY_QUANTISER[name]()(x)


@pytest.mark.parametrize(
    ("name", "decode", "size", "least"),
    [
        ("VectorQuantize", "get_codes_from_indices", 16, -1),
        ("VectorQuantize", "get_output_from_indices", 16, -1),
        ("ResidualVQ", "get_codes_from_indices", 16, -1),
        ("ResidualVQ", "get_output_from_indices", 16, -1),
        ("FSQ", "indices_to_codes", 200, 0),
        ("LFQ", "indices_to_codes", 16, 0),
        ("SimVQ", "indices_to_codes", 16, 0),
    ],
)
def test_an_index_of_no_code_is_named_rather_than_decoded(name, decode, size, least):
    quantiser = EVERY_QUANTISER[name]()
    decode = getattr(quantiser, decode)
    indices = torch.full((2, 5, 2), size - 1)
    assert torch.equal(decode(indices), decode(indices.int()))
    for wrong in (size, least - 1):
        with pytest.raises(ValueError, match=rf"^indices: expected values in {least}\.\.{size - 1} .*{wrong}\.\."):
            decode(indices * 0 + wrong)
    for wrong in (indices.float(), [0, 1], None):
        with pytest.raises(TypeError, match="^indices: expected an int64 or int32 tensor, got"):
            decode(wrong)


@pytest.mark.parametrize("name", EVERY_QUANTISER)
@pytest.mark.parametrize("training", [True, False])
def test_shapes_are_worked_out_on_the_meta_device(name, training):
    x = torch.randn(2, 8, 4, 8)
    with torch.device("meta"):
        on_meta = EVERY_QUANTISER[name]().train(training)
    for there, here in zip(on_meta(x.to("meta")), EVERY_QUANTISER[name]().train(training)(x), strict=True):
        assert there.is_meta and (there.shape, there.dtype) == (here.shape, here.dtype)


@pytest.mark.parametrize("name", EVERY_QUANTISER)
@pytest.mark.parametrize("assign", [True, False])
def test_weights_loaded_into_a_module_made_on_the_meta_device_are_all_it_needs(name, assign):
    x = torch.randn(2, 8, 4, 8)
    trained = EVERY_QUANTISER[name]()
    with torch.device("meta"):
        loaded = EVERY_QUANTISER[name]()
    if not assign:
        loaded.to_empty(device="cpu")
    loaded.load_state_dict(trained.state_dict(), assign=assign)
    for theirs, ours in zip(trained.eval()(x), loaded.eval()(x), strict=True):
        assert torch.equal(theirs, ours)


# Options that reach all the code of a training step.
EVERY_STEP = EVERY_QUANTISER | {
    "stochastic": lambda: VectorQuantize(8, 16, stochastic_sample_codes=True, threshold_ema_dead_code=1.0),
    "cosine": lambda: VectorQuantize(8, 16, use_cosine_sim=True, kmeans_init=True, kmeans_start="afkmc2"),
    "heads": lambda: VectorQuantize(8, 16, heads=2, separate_codebook_per_head=True, threshold_ema_dead_code=1.0),
    "cross entropy": lambda: VectorQuantize(
        8, 16, commitment_use_cross_entropy_loss=True, learnable_codebook=True, ema_update=False
    ),
    "stages": lambda: ResidualVQ(dim=8, num_quantizers=3, codebook_size=16, codebook_dim=4, use_cosine_sim=True),
    "dropout": lambda: ResidualVQ(dim=8, num_quantizers=3, codebook_size=16, quantize_dropout=True),
    "groups with dropout": lambda: GroupedResidualVQ(
        dim=8, groups=2, num_quantizers=3, codebook_size=16, quantize_dropout=True
    ),
}


def step(quantiser, x, **call):
    """One training step: what it returned, and the gradient of x."""
    x = x.detach().requires_grad_()
    result = quantiser(x, **call)
    sum(part.float().sum() for part in result if part.is_floating_point()).backward()
    return *result, x.grad


@pytest.mark.parametrize("name", EVERY_STEP)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_module_of_any_precision_trains(name, dtype):
    quantiser, x = EVERY_STEP[name]().to(dtype), torch.randn(2, 8, 4, 8, dtype=dtype)
    for _ in range(2):
        quantized, *_, grad = step(quantiser, x)
    assert quantized.dtype == grad.dtype == dtype and grad.isfinite().all()
    assert all(value.isfinite().all() for value in quantiser.state_dict().values())


@pytest.mark.parametrize("name", [name for name in EVERY_STEP if name not in ("images", "FSQ", "LFQ", "SimVQ")])
def test_padding_may_hold_anything(name):
    quantiser, mask = EVERY_STEP[name](), torch.rand(2, 5) < 0.6
    x = torch.randn(2, 5, 8)
    x[~mask] = torch.nan
    for _ in range(2):
        *_, loss, grad = step(quantiser, x, mask=mask)[-2:]
    assert loss.isfinite().all() and grad[mask].isfinite().all()
    for value in (*quantiser.state_dict().values(), *(p.grad for p in quantiser.parameters())):
        assert value.isfinite().all()


@pytest.mark.parametrize("name", ["stochastic", "heads", "dropout"])
def test_compiles_for_batches_of_every_size(name):
    """The whole training step in one graph, but for quantiser dropout."""
    torch.compiler.reset()
    quantiser, twin = EVERY_STEP[name](), EVERY_STEP[name]()
    step(quantiser, torch.randn(64, 8, 4, 8))  # a start from k-means is part of the first step only
    twin.load_state_dict(quantiser.state_dict())
    compiled = torch.compile(twin, fullgraph="dropout" not in name, backend="aot_eager")
    for size in (3, 4, 6):
        x = torch.randn(size, 8, 4, 8)
        torch.manual_seed(size)
        expected = step(quantiser, x)
        torch.manual_seed(size)
        for ours, theirs in zip(step(compiled, x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_quantiser_dropout_is_drawn_on_the_host_whatever_the_default_device():
    with torch.device("meta"):
        vq = EVERY_STEP["dropout"]()
        quantized, indices, _ = vq(torch.randn(2, 5, 8))
    assert quantized.is_meta and indices.shape == (2, 5, 3)


@pytest.mark.parametrize("name", EVERY_STEP)
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_loading_does_nothing_on_the_meta_device(name):
    with torch.device("meta"):
        quantiser = EVERY_STEP[name]()
    quantiser.load_state_dict(EVERY_STEP[name]().state_dict())
    assert all(value.is_meta for value in quantiser.state_dict().values())


def test_an_empty_first_batch_leaves_k_means_to_the_next():
    vq, x = EVERY_STEP["cosine"](), torch.randn(64, 8)
    vq(x[:0])
    assert not vq.initialised
    vq(x)
    assert vq.initialised


@pytest.mark.parametrize("wrong", [-2, 16])
def test_an_index_of_no_code_has_no_cross_entropy(wrong):
    with pytest.raises(ValueError, match=rf"^indices: expected values in -1\.\.15 .*{wrong}"):
        VectorQuantize(8, 16)(torch.randn(2, 5, 8), torch.full((2, 5), wrong))
