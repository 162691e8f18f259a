"""Which pair a rater sees next."""

from __future__ import annotations

import random

from evaluation.study.entries import Entries
from evaluation.study.store import Showing, Store

GAP = 4
"""Pairs between a first and a second look, at least."""


class Assignment:
    """Pairs with the fewest votes first, at random among them; now and then one a second time."""

    def __init__(self, entries: Entries, store: Store, per_rater: int, repeat_every: int, rng: random.Random):
        """Args:
        per_rater: pairs that a rater is asked, second looks counted in.
        repeat_every: every so many pairs one is a second look, sides changed; 0 is never.
        """
        self.entries, self.store, self.rng = entries, store, rng
        self.per_rater, self.repeat_every = per_rater, repeat_every

    def expected(self) -> int:
        """How many pairs a rater will see, about: the first second look comes too soon."""
        pairs = len(self.entries.comparisons)
        again = max(0, pairs // self.repeat_every - 1) if self.repeat_every else 0
        return min(self.per_rater, pairs + again)

    def next(self, rater: str) -> Showing | None:
        """The one that waits for an answer, else a new one; None when the rater is through."""
        seen = [showing for showing in self.store.of(rater) if showing.comparison in self.entries]
        for showing in seen:
            if showing.choice is None:
                return showing
        if len(seen) >= self.per_rater:
            return None
        return self._second_look(rater, seen) or self._first_look(rater, seen)

    def _second_look(self, rater: str, seen: list[Showing]) -> Showing | None:
        if not self.repeat_every or (len(seen) + 1) % self.repeat_every:
            return None
        again = {showing.comparison for showing in seen if showing.repeat}
        known = [showing for showing in seen[:-GAP] if not showing.repeat and showing.comparison not in again]
        if not known:
            return None
        first = self.rng.choice(known)
        return self.store.show(rater, first.comparison, 1, not first.a_is_left, first.caption)

    def _first_look(self, rater: str, seen: list[Showing]) -> Showing | None:
        known = {showing.comparison for showing in seen}
        left = [comparison for comparison in self.entries.comparisons if comparison not in known]
        if not left:
            return None
        counts = self.store.counts()
        fewest = min(counts.get(comparison, 0) for comparison in left)
        chosen = self.rng.choice([comparison for comparison in left if counts.get(comparison, 0) == fewest])
        return self.store.show(rater, chosen, 0, self.rng.random() < 0.5, self.entries.captions[chosen.name])
