"""Contents of an artifact that stores a model without any loss, for tests that need no fit."""

from bytecap.format.coders.exact import CODER as EXACT
from bytecap.format.container import Contents, FileSection, UnitSection
from bytecap.format.sidefiles import packing
from bytecap.types import as_matrix


def contents_of(model):
    """The model stored without any loss."""
    units = tuple(
        UnitSection(u, EXACT.tag, EXACT.encode(as_matrix(u, model.tensor(u).detach().numpy()), u.dtype))
        for u in model.units
    )
    return Contents(units, b"", tuple(FileSection(n, packing.pack(n, d)) for n, d in model.files.items()), {})
