"""Who runs with whom, and when."""

from __future__ import annotations

import asyncio

import pytest

from serve.turns import Ticket, Turns
from serve.work import BatchKey, Shot


def key(steps: int) -> BatchKey:
    return BatchKey(32, 32, steps, 0.0, "none", 1.0, False)


class Device:
    """Records its batches; each takes as long as it is told."""

    def __init__(self):
        self.batches: list[tuple[int, list[int]]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = 0

    async def run(self, key, tickets):
        self.running += 1
        assert self.running == 1, "two batches at once"
        self.batches.append((key.steps, [ticket.shot.seed for ticket in tickets]))
        await self.gate.wait()
        await asyncio.sleep(0)
        self.running -= 1
        if any(ticket.shot.seed == 666 for ticket in tickets):
            raise RuntimeError("broken")
        return [ticket.shot.seed * 10 for ticket in tickets]


def ticket(steps: int, seed: int) -> Ticket[int]:
    return Ticket(key(steps), Shot("x", seed), asyncio.get_running_loop().create_future())


def test_equal_keys_run_together_oldest_first():
    async def main():
        device = Device()
        turns = Turns(device.run, max_batch=3)
        device.gate.clear()
        first = ticket(1, 0)
        turns.enter([first])
        await asyncio.sleep(0)
        # while the device is busy, what arrives one by one becomes full batches
        rest = [ticket(steps, i) for i, steps in enumerate([4, 8, 4, 4, 8, 4, 4, 4], start=1)]
        for one in rest:
            turns.enter([one])
        assert len(turns) == 8
        device.gate.set()
        assert await asyncio.gather(*(one.future for one in [first, *rest])) == [10 * i for i in range(9)]
        # 4 was first; then 8 has the oldest; then what is left of 4
        assert device.batches == [(1, [0]), (4, [1, 3, 4]), (8, [2, 5]), (4, [6, 7, 8])]

    asyncio.run(main())


def test_who_has_gone_takes_no_turn():
    async def main():
        device = Device()
        turns = Turns(device.run, max_batch=2)
        device.gate.clear()
        tickets = [ticket(1, i) for i in range(6)]
        turns.enter(tickets)
        await asyncio.sleep(0)
        for one in (tickets[2], tickets[3], tickets[5]):
            one.future.cancel()
        assert len(turns) == 1
        device.gate.set()
        await tickets[4].future
        assert device.batches == [(1, [0, 1]), (1, [4])]
        # and one that leaves during its batch harms nobody
        device.gate.clear()
        pair = [ticket(1, 7), ticket(1, 8)]
        turns.enter(pair)
        await asyncio.sleep(0)
        pair[0].future.cancel()
        device.gate.set()
        assert await pair[1].future == 80

    asyncio.run(main())


def test_a_failed_batch_is_its_own_affair():
    async def main():
        turns = Turns(Device().run, max_batch=2)
        tickets = [ticket(1, 666), ticket(1, 1), ticket(1, 2)]
        turns.enter(tickets)
        results = await asyncio.gather(*(one.future for one in tickets), return_exceptions=True)
        assert [type(r) for r in results[:2]] == [RuntimeError, RuntimeError]
        assert results[2] == 20
        later = ticket(1, 3)
        turns.enter([later])
        assert await later.future == 30

    asyncio.run(main())


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_ticket_gets_its_own_answer(count):
    async def main():
        turns = Turns(Device().run, max_batch=3)
        tickets = [ticket(1 + i % 2, i) for i in range(count)]
        turns.enter(tickets)
        assert await asyncio.gather(*(one.future for one in tickets)) == [10 * i for i in range(count)]
        assert len(turns) == 0

    asyncio.run(main())
