"""What each op is: a folder per op with its definition, its Triton kernel, its test and benchmark spec, its notes."""
