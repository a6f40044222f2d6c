"""Sizes of networks that are chosen by the size of what they see."""


def mults_for(image_size: int) -> tuple[int, ...]:
    """Levels of an autoencoder that leave a grid of about 4 to 16 codes a side."""
    if image_size <= 16:
        return (1, 2)
    if image_size <= 64:
        return (1, 2, 2)
    if image_size <= 128:
        return (1, 2, 2, 4)
    return (1, 1, 2, 2, 4)


def cell_mults(image_size: int) -> tuple[int, ...]:
    """Levels of a small DQ-VAE: cells of at most 8 pixels, and at least four of them a side where there is a choice."""
    levels = 2
    while levels < 4 and image_size % 2**levels == 0 and image_size // 2**levels >= 4:
        levels += 1
    return (1, 2, 2, 2)[:levels]


def halvings(grid: int) -> tuple[int, ...]:
    """Levels of the U-Net, as many of the paper's four as the grid can be halved for."""
    mults = (1, 2, 4, 8)
    levels = 1
    while levels < len(mults) and grid % 2**levels == 0:
        levels += 1
    return mults[:levels]


def most_disc_layers(image_size: int) -> int:
    """Halvings of the discriminator: the published three, or as many as leave a logit."""
    return max(n for n in (1, 2, 3) if n == 1 or 3 * 2**n <= image_size)
