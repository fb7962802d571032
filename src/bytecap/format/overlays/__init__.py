"""Read and write overlays, one file each, which the coder `stack` applies to its base's decoded matrix."""
