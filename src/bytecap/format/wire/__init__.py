"""Building blocks of sections: bits, integers, indices, lists of positions, and objects that units share."""
