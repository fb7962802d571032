"""Overlays: exception paths as stored, one file each. A stack applies them to what its base coder decoded."""
