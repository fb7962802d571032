"""Code integers near their entropy: frequency tables, interleaved rANS streams, and their compiled loops."""
