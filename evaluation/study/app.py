"""The study's page and what it talks to."""

from __future__ import annotations

import random
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Cookie, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from evaluation.study.assignment import Assignment
from evaluation.study.entries import Entries
from evaluation.study.store import Choice, Showing, Store

PAGE = Path(__file__).parent / "page"
COOKIE = "rater"
POLICY = "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; connect-src 'self'"

RaterId = Annotated[str | None, Cookie(alias=COOKIE)]


class Vote(BaseModel):
    """A rater's answer."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    ticket: str = Field(pattern=r"^[0-9a-f]{32}$")
    choice: Literal["left", "right", "tie"]
    seconds: float = Field(ge=0, le=86400)


class Pair(BaseModel):
    """What the page shows: nothing in it tells one model from the other."""

    ticket: str
    prompt: str
    left: str
    right: str
    number: int
    of: int
    can_go_back: bool


class State(BaseModel):
    """The next pair, or none when the rater is through."""

    question: str
    pair: Pair | None
    answered: int


class Study:
    """Entries, votes and assignment behind one lock: two tabs of one rater must not be given one pair twice."""

    def __init__(
        self, entries: Entries, store: Store, question: str, per_rater: int, repeat_every: int, seed: int | None
    ):
        self.entries, self.store, self.question = entries, store, question
        self.assignment = Assignment(entries, store, per_rater, repeat_every, random.Random(seed))
        self.lock = threading.Lock()

    def state(self, rater: str) -> State:
        """What this rater is to see."""
        with self.lock:
            showing = self.assignment.next(rater)
        answered = sum(one.choice is not None for one in self.store.of(rater))
        return State(question=self.question, pair=self.pair(showing, answered) if showing else None, answered=answered)

    def pair(self, showing: Showing, answered: int) -> Pair:
        """As the page gets it."""
        links = {side: f"/image/{showing.ticket}/{side}" for side in ("left", "right")}
        of = self.assignment.expected()
        number = answered + 1 if showing.choice is None else answered
        return Pair(
            ticket=showing.ticket, prompt=showing.caption, number=number, of=max(of, number),
            can_go_back=answered > 0 and showing.choice is None, **links,
        )  # fmt: skip

    def back(self, rater: str) -> State:
        """The pair that the rater answered last, to be answered anew."""
        answered = [one for one in self.store.of(rater) if one.choice and one.comparison in self.entries]
        if not answered:
            raise HTTPException(409, "there is no answer to go back to")
        last = max(answered, key=lambda one: (one.answered, one.shown))
        return State(question=self.question, pair=self.pair(last, len(answered)), answered=len(answered))

    def own(self, ticket: str, rater: str | None) -> Showing:
        """A ticket's showing, if it was given to this rater and the study still has it.

        Raises:
            HTTPException: 404 for one that was never given out, 403 for somebody else's.
        """
        showing = self.store.find(ticket)
        if showing is None or showing.comparison not in self.entries:
            raise HTTPException(404, "no such pair was shown")
        if showing.rater != rater:
            raise HTTPException(403, "this pair was shown to somebody else")
        return showing

    def vote(self, vote: Vote, rater: str) -> None:
        """Keep an answer."""
        showing = self.own(vote.ticket, rater)
        left: Choice = "a" if showing.a_is_left else "b"
        right: Choice = "b" if showing.a_is_left else "a"
        choices: dict[str, Choice] = {"left": left, "right": right, "tie": "tie"}
        self.store.answer(vote.ticket, choices[vote.choice], vote.seconds)


def make_app(study: Study) -> FastAPI:
    """The application: a page, the next pair, its pictures, a vote, a step back."""
    app = FastAPI(title="study", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    def known(rater: str | None) -> str:
        if rater is None or not study.store.knows(rater):
            raise HTTPException(403, "the rater is unknown: open the page first")
        return rater

    @app.get("/")
    def page(rater: RaterId = None) -> Response:
        response = FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-store"})
        if rater is None or not study.store.knows(rater):
            month = 30 * 86400
            response.set_cookie(COOKIE, study.store.add_rater(), max_age=month, httponly=True, samesite="strict")
        return response

    @app.get("/study.js")
    def script() -> FileResponse:
        return FileResponse(PAGE / "study.js")

    @app.get("/study.css")
    def style() -> FileResponse:
        return FileResponse(PAGE / "study.css")

    @app.get("/api/next")
    def following(rater: RaterId = None) -> State:
        return study.state(known(rater))

    @app.post("/api/vote")
    def vote(vote: Vote, rater: RaterId = None) -> State:
        study.vote(vote, known(rater))
        return study.state(known(rater))

    @app.post("/api/back")
    def back(rater: RaterId = None) -> State:
        return study.back(known(rater))

    @app.get("/image/{ticket}/{side}")
    def image(ticket: str, side: Literal["left", "right"], rater: RaterId = None) -> Response:
        showing = study.own(ticket, known(rater))
        picture = study.entries.picture(showing.model(side), showing.name)
        return Response(picture, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    return app
