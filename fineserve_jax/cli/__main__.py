"""`python -m fineserve_jax.cli`."""

import sys

from fineserve_jax.cli import main

sys.exit(main())
