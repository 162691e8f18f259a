"""A study in which people choose between two models' pictures (paper, Fig. 7)."""
