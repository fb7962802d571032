"""Pack side files (config, tokenizer) as small as possible and give them back byte for byte."""
