"""`python -m vqfast.cli`, for launchers such as `torchrun --nproc-per-node 2 -m vqfast.cli train ...`."""

import sys

from vqfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
