"""Whether a Triton kernel may round a * b + c once: said at every launch, as Triton's default changes by version."""

FUSED = {"enable_fp_fusion": True}

# Every product and every sum is rounded: without that the remainders of two_sum and two_product are wrong.
SEPARATE = {"enable_fp_fusion": False}
