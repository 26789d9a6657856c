"""The engine: its construction, settings, loop, and what it tells of itself."""
