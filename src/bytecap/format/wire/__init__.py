"""Read and write the building blocks of sections: bits, integers, indices, positions, shared objects."""
