"""`python -m bitnet_jax` is the command `bitnet-jax`."""

import sys

from bitnet_jax.cli import main

sys.exit(main())
