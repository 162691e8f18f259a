"""The embedded world: a real but small model and its data, so that every job runs on a laptop.

`catalogue` names the emoji, `compose` draws the pictures, `shards` writes them; `paths` is where the committed results are.
"""
