"""One family of errors. Every one a caller can cause is a ``ValueError``, so ``except ValueError`` keeps working."""


class LouverError(Exception):
    """Base of everything Louver raises on purpose."""


class ShapeError(LouverError, ValueError):
    """A tensor has the wrong rank, size, dtype or device."""


class NonFiniteError(LouverError, ValueError):
    """A query or a threshold is NaN or infinite, so no bound on it means anything."""


class PolicyError(LouverError, ValueError):
    """A policy specification cannot be read, or does not fit the index it is used with."""


class BackendError(LouverError, ValueError):
    """A named backend is unknown or missing on this machine."""


class UnsupportedModelError(LouverError, ValueError):
    """A model, cache or call that Louver cannot serve with its guarantee."""


class InputFileError(LouverError, ValueError):
    """A file or model given on the command line is missing or unreadable."""


class CacheFileError(LouverError, ValueError):
    """A saved cache is truncated, corrupt, of another format or of another model."""


class OutOfRoomError(LouverError, ValueError):
    """A cache does not fit where it was to live: the GPU, locked host memory or the disk."""


class LouverWarning(UserWarning):
    """Something works, but not as fast or as widely as asked."""
