"""Default numbers of tokens, apart from the code that reads texts because the command line shows them."""

WINDOW = 512  # predicted tokens
TOKENS = 131_072  # statistics; results/calibration.jsonl has the curve behind this number
SAMPLED_TOKENS = 524_288  # on a GPU without text of the user's: KL 0.254 with 262,144, 0.263 with 131,072 (SmolLM2)
SAMPLED_WORK = 7.5e13  # tokens times parameters: larger models get fewer samples, down to TOKENS
EVALUATION_TOKENS = 32_768
