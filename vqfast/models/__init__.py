"""Models: the networks and the generative models built of them. No trainer, no file, no config parser."""
