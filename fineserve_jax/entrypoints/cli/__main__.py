"""`python -m fineserve_jax.entrypoints.cli`."""

import sys

from fineserve_jax.entrypoints.cli import main

sys.exit(main())
