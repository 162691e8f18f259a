"""For every test: nothing is fetched, and clusters of the tests' own ask for no token."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
