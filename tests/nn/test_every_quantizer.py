"""What every quantiser does with input that is none, with indices of no code, and on the meta device."""

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
