"""Errors that no user input causes: each one is a defect of the calling code."""


class PageError(ValueError):
    """Pages used by someone who does not own them: a double free, another class's page, a made-up number."""


class IntegrityError(RuntimeError):
    """What is recorded about pages contradicts itself."""
