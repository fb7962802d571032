"""Research tools over bytecap: byte-return curves, comparisons, the thesis, tied layers, training, submissions."""
