"""Votes in a database, through SQLAlchemy: SQLite by default, PostgreSQL by its URL."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from sqlalchemy import ForeignKey, String, UniqueConstraint, create_engine, event, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from evaluation.study.entries import Comparison
from hypersd_ray.config.base import ConfigError

Choice = Literal["a", "b", "tie"]


class Base(DeclarativeBase):
    """The study's tables."""


class Rater(Base):
    """Somebody who votes; known by a random name in a cookie."""

    __tablename__ = "rater"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    joined: Mapped[datetime]


class Showing(Base):
    """A pair as it was put before a rater, and the answer once there is one.

    Attributes:
        ticket: random; the only thing a browser learns, so it cannot tell which side is which model.
        repeat: 0, or 1 where the rater sees the pair a second time, sides changed.
    """

    __tablename__ = "showing"
    __table_args__ = (UniqueConstraint("rater", "name", "model_a", "model_b", "repeat"),)
    ticket: Mapped[str] = mapped_column(String(32), primary_key=True)
    rater: Mapped[str] = mapped_column(ForeignKey("rater.id"), index=True)
    name: Mapped[str] = mapped_column(String(512))
    model_a: Mapped[str] = mapped_column(String(256))
    model_b: Mapped[str] = mapped_column(String(256))
    repeat: Mapped[int]
    a_is_left: Mapped[bool]
    shown: Mapped[datetime]
    choice: Mapped[str | None] = mapped_column(String(3))
    answered: Mapped[datetime | None]
    seconds: Mapped[float | None]
    caption: Mapped[str] = mapped_column(default="")

    @property
    def comparison(self) -> Comparison:
        """What it shows."""
        return Comparison(self.name, self.model_a, self.model_b)

    def model(self, side: Literal["left", "right"]) -> str:
        """The model on a side."""
        return self.model_a if (side == "left") == self.a_is_left else self.model_b


class Picture(Base):
    """Which picture a name of a model stands for: votes are of that one."""

    __tablename__ = "picture"
    model: Mapped[str] = mapped_column(String(256), primary_key=True)
    name: Mapped[str] = mapped_column(String(512), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))


def now() -> datetime:
    """In UTC, without a zone: SQLite keeps none."""
    return datetime.now(UTC).replace(tzinfo=None)


def without_password(database: str) -> str:
    """A database's path or URL as it may be printed."""
    if "://" not in database:
        return database
    try:
        return make_url(database).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return f"{database.partition('://')[0]}://..."


class Store:
    """A database with the tables; they are made where they are missing."""

    def __init__(self, url: str):
        """Args:
            url: SQLAlchemy's, or the path of an SQLite file.

        Raises:
            ConfigError: the database cannot be reached.
        """
        url = url if "://" in url else f"sqlite:///{url}"
        try:
            parsed = make_url(url)
            if parsed.get_backend_name() == "sqlite" and parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            self.engine = create_engine(parsed, pool_pre_ping=True)
            if parsed.get_backend_name() == "sqlite":
                event.listen(self.engine, "connect", _several_writers)
            Base.metadata.create_all(self.engine)
        except (SQLAlchemyError, ValueError, OSError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"--database {without_password(url)}: {reason}; give an SQLite file, or a URL such as postgresql+psycopg://user@host/name"
            ) from None

    @contextmanager
    def session(self) -> Iterator[Session]:
        """What is done within it is kept when it ends well, and only then."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def keep_pictures(self, hashes: dict[tuple[str, str], str]) -> None:
        """Remember which pictures are compared.

        Raises:
            ConfigError: another one was compared under a model's name and its own; nothing is kept then.
        """
        with self.session() as session:
            known = {(one.model, one.name): one.sha256 for one in session.scalars(select(Picture))}
            changed = [key for key, sha256 in hashes.items() if known.get(key, sha256) != sha256]
            if changed:
                model, name = changed[0]
                raise ConfigError(
                    f"--database: {len(changed)} pictures are not those that it has votes on, first {name} of {model}: give "
                    "the model another name, or name another database"
                )
            session.add_all(Picture(model=m, name=n, sha256=h) for (m, n), h in hashes.items() if (m, n) not in known)

    def add_rater(self) -> str:
        """A new rater's name."""
        rater = secrets.token_hex(16)
        with self.session() as session:
            session.add(Rater(id=rater, joined=now()))
        return rater

    def knows(self, rater: str) -> bool:
        """Whether that name was ever given out."""
        with self.session() as session:
            return session.get(Rater, rater) is not None

    def find(self, ticket: str) -> Showing | None:
        """The showing of a ticket."""
        with self.session() as session:
            return session.get(Showing, ticket)

    def show(self, rater: str, comparison: Comparison, repeat: int, a_is_left: bool, caption: str) -> Showing:
        """Put a pair before a rater."""
        showing = Showing(
            ticket=secrets.token_hex(16), rater=rater, name=comparison.name, model_a=comparison.a,
            model_b=comparison.b, repeat=repeat, a_is_left=a_is_left, shown=now(), caption=caption,
        )  # fmt: skip
        with self.session() as session:
            session.add(showing)
        return showing

    def answer(self, ticket: str, choice: Choice, seconds: float) -> None:
        """Keep a vote, in the place of one that the rater took back; on disk when this returns."""
        with self.session() as session:
            showing = session.get_one(Showing, ticket)
            showing.choice, showing.answered, showing.seconds = choice, now(), seconds

    def of(self, rater: str) -> list[Showing]:
        """A rater's showings, in their order."""
        with self.session() as session:
            return list(session.scalars(select(Showing).where(Showing.rater == rater).order_by(Showing.shown)))

    def counts(self) -> dict[Comparison, int]:
        """How many first votes each pair has."""
        columns = (Showing.name, Showing.model_a, Showing.model_b)
        query = (
            select(*columns, func.count()).where(Showing.choice.is_not(None), Showing.repeat == 0).group_by(*columns)
        )
        with self.session() as session:
            return {Comparison(name, a, b): count for name, a, b, count in session.execute(query)}

    def votes(self) -> list[Showing]:
        """Everything that was answered, in the order of the answers."""
        with self.session() as session:
            return list(session.scalars(select(Showing).where(Showing.choice.is_not(None)).order_by(Showing.answered)))


def _several_writers(connection, record) -> None:
    """SQLite: readers do not stop the writer, and a writer waits for the one before it."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a vote that was acknowledged survives a power cut
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.close()
