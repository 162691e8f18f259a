"""Reward models r_d(x'_0, c) of Eq. 11, 12 and 15: images in [0, 1] and prompts in, one score per image out."""
