"""Checkpoints of released code, renamed to the modules here: tensors by name in, configuration and state dict out."""

from vqfast.models.converters.dq_transformer import dq_transformer_state_dict
from vqfast.models.converters.dqvae import dqvae_config, dqvae_state_dict
from vqfast.models.converters.taming import lpips_state_dict, vqgan_config, vqgan_state_dict
from vqfast.models.converters.vqddm import vqddm_config, vqddm_state_dict, vqddm_unet_state_dict

__all__ = [
    "dqvae_config",
    "dqvae_state_dict",
    "dq_transformer_state_dict",
    "lpips_state_dict",
    "vqddm_config",
    "vqddm_state_dict",
    "vqddm_unet_state_dict",
    "vqgan_config",
    "vqgan_state_dict",
]
