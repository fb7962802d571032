"""A second reader, written from docs/format.md alone by someone who had not seen the others. Slow and strict.

It shares no line with `bytecap` and is used only to hold the document, the decoders and the goldens together.
"""
