"""Define every error that bytecap raises on purpose.

The tree (all derive from `BytecapError`, so one `except` catches them all)::

    BytecapError
    ├── UsageError          an argument cannot be understood (a size, a method name)
    ├── BudgetError         the budget is below the smallest reachable file; `.floor` names it
    ├── CheckpointError     the model on disk is missing, damaged, or not a format we read
    ├── TextError           calibration or evaluation text is missing, too short, or not UTF-8
    ├── OutputError         the result cannot be written
    ├── ShortageError       the memory does not suffice; the message says how much a job needs
    ├── RankError           a process of a job that several share is lost
    ├── CodeError           a source file cannot be packed, or a submission does not hold
    └── ArtifactError       a `.bcap` file cannot be trusted
        ├── NotAnArtifact   it is some other kind of file
        ├── VersionError    it was written by a newer, incompatible version of the format
        ├── BaseError       it is an update, and its base is missing or another file
        └── CorruptError    it is truncated, or a checksum, count or offset is wrong

Beside the errors there is `BytecapWarning`, the category of every warning.

Messages are one line and name the file, tensor and number at fault.

>>> issubclass(CorruptError, ArtifactError) and issubclass(ArtifactError, BytecapError)
True
"""

from __future__ import annotations


class BytecapWarning(UserWarning):
    """A job goes on, but its result may not be what was meant; the same text is in `Artifact.report["warnings"]`."""


class BytecapError(Exception):
    """Base class of every deliberate error."""


class UsageError(BytecapError):
    """An argument cannot be understood."""


class BudgetError(BytecapError):
    """The budget cannot be met.

    Attributes:
        floor: smallest reachable file size in bytes.
    """

    def __init__(self, message: str, floor: int) -> None:
        super().__init__(message)
        self.floor = floor


class CheckpointError(BytecapError):
    """The model cannot be read."""


class TextError(BytecapError):
    """A text cannot be used."""


class OutputError(BytecapError):
    """The result cannot be written."""


class ShortageError(BytecapError):
    """The memory does not suffice."""


class RankError(BytecapError):
    """A process of a job that several share is lost."""


class CodeError(BytecapError):
    """A source file cannot be packed, or a submission made of code does not hold."""


class ArtifactError(BytecapError):
    """A `.bcap` file cannot be trusted."""


class NotAnArtifact(ArtifactError):  # noqa: N818 (reads as a statement, like the standard library's NotADirectory)
    """The file is not a bytecap artifact."""


class VersionError(ArtifactError):
    """The file needs a newer reader."""


class BaseError(ArtifactError):
    """The file is an update whose base is missing, or is another file."""


class CorruptError(ArtifactError):
    """The file is truncated or damaged."""
