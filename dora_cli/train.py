"""``python -m dora_cli.train``, as ``torchrun -m dora_cli.train`` starts it: the command ``dora-train``."""

import sys

from dora_cli.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
