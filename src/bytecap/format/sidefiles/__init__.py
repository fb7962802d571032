"""Side files (config, tokenizer) as small as they go, byte for byte the same when they come back."""
