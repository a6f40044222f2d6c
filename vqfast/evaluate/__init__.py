"""Measures of images and codes, the pictures that show them, and the reports that gather both."""

from vqfast.evaluate.codes import codebook_usage, perplexity
from vqfast.evaluate.images import psnr, ssim

__all__ = ["codebook_usage", "perplexity", "psnr", "ssim"]
