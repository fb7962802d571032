"""Research tools on top of bytecap: byte-return curves, comparisons, the thesis, tied layers, training, submissions."""
