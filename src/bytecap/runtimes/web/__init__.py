"""Make folders that run a GGUF file in a browser: the runtime of an npm package, the page, and their bytes."""
