"""Touch the operating system: atomic files, memory, threads, and the cache of measured results."""
