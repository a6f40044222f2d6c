"""What kernels of uniform noise and the joint rule leave to other backends."""

# Where an op's arguments say what the kernels of some backends are not made for.
_FAMILY = {"q_sample": (2, 3, None), "diffusion_loss": (5, 6, 8), "p_sample": (5, 6, 8)}


def beyond_uniform(op: str, args: tuple) -> str | None:
    """None where a diffusion op is asked for uniform noise and the joint rule, untruncated; else what is more."""
    if op not in _FAMILY or not args:
        return None
    levels, noise, marginal = _FAMILY[op]
    if args[levels].shape[1] != 1:
        return "a mask state"
    if args[noise] is not None:
        return "noise that is not uniform"
    if marginal is not None and args[marginal]:
        return "the marginal rule"
    if op == "p_sample" and (args[1] is not None or args[11] or args[12] < 1):
        return "guidance, top_k or top_p"
    return None
