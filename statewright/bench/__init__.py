"""Measurements against peers and physical floors: ratios, interleaved, behind a green gate."""
