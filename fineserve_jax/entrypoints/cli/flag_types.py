"""Types of flags that commands share and that need nothing but tyro."""

from typing import Annotated

import tyro

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]
"""A flag without a value, off unless given."""
