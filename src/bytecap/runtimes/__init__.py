"""Files for other people's programs: the same statistics, rounding and allocation, in formats that run elsewhere.

`blocks` rounds weights to the fixed layouts that runtimes read; `gguf` puts a model into a file for llama.cpp,
`directory` into directories for MLX and for compressed-tensors. What differs from one
runtime to the next is a table of layouts and a writer; everything else is the package's own.
"""
