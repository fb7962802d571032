"""Default numbers of tokens; they stand apart from the code that reads texts because the command line shows them."""

WINDOW = 512  # predicted tokens
TOKENS = 131_072  # statistics; results/calibration.jsonl has the curve behind this number
EVALUATION_TOKENS = 32_768
