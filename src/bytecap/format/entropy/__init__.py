"""The entropy coder: frequency tables, interleaved rANS streams, and their compiled loops."""
