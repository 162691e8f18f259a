"""Everything of the reward side that knows Ray: shared actors, their placement, and the call across the boundary."""
