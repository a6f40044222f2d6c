"""The models by the name of their kind, under which their runs and checkpoints go."""

from torch import nn

from vqfast.models.autoencoder import Autoencoder
from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.dqvae import DQVAE, DQVAEConfig
from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig
from vqfast.models.vqddm import VQDDM, VQDDMConfig
from vqfast.models.vqgan import VQGAN, VQGANConfig
from vqfast.models.vqvae import VQVAE, VQVAEConfig

# kind -> (model, its configuration)
MODELS: dict[str, tuple[type[nn.Module], type]] = {
    "vqvae": (VQVAE, VQVAEConfig),
    "vqgan": (VQGAN, VQGANConfig),
    "dqvae": (DQVAE, DQVAEConfig),
    "vqddm": (VQDDM, VQDDMConfig),
    "dq_transformer": (DQTransformer, DQTransformerConfig),
    "raster_gpt": (RasterGPT, RasterGPTConfig),
}
# Those that make of an image one grid of codes, and of that an image.
AUTOENCODERS = tuple(kind for kind, (model_class, _) in MODELS.items() if issubclass(model_class, Autoencoder))


def kind_of(model: nn.Module) -> str:
    """The kind of a model.

    Raises:
        TypeError: a model of no known kind.
    """
    for kind, (model_class, _) in MODELS.items():
        if isinstance(model, model_class):
            return kind
    raise TypeError(f"model: expected one of {', '.join(MODELS)}, got {type(model).__name__}")


def build(kind: str, config: dict) -> nn.Module:
    """A model of its kind from the plain values of its configuration.

    Raises:
        ValueError: an unknown kind.
        TypeError, ValueError: values that are no configuration of it.
    """
    if kind not in MODELS:
        raise ValueError(f"kind: expected one of {', '.join(MODELS)}, got {kind!r}")
    model_class, config_class = MODELS[kind]
    return model_class(config_class(**config))
