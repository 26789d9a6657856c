"""What holds for all tests."""

from hypothesis import settings

# A machine that is busy with something else fails no test.
settings.register_profile("timeless", settings(), deadline=None)
settings.load_profile("timeless")

pytest_plugins = ["compiling"]
