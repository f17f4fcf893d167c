"""How far the codes of stored rows are from the rate-distortion bound."""
