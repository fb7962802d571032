"""The version of the library, in a module of its own so that nothing has to import the face for it."""

__version__ = "0.1.0"
