"""The study: closed forms of the scores, what a browser can and cannot send, and people at work in Chromium."""

from __future__ import annotations

import csv
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

pytest.importorskip("sqlalchemy")
import uvicorn
from fastapi.testclient import TestClient
from scipy import optimize
from sqlalchemy import create_engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from evaluation.study.analysis import analyse, as_text, bradley_terry, write_csv
from evaluation.study.app import COOKIE, Study, make_app
from evaluation.study.assignment import Assignment
from evaluation.study.entries import Comparison, Entries, read_folders
from evaluation.study.store import Base, Store
from hypersd_ray.config.base import ConfigError

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """Two models: one paints red, one blue, 12 prompts; the files tell their model."""
    for model, colour in COLOURS.items():
        (tmp_path / model).mkdir()
        for i in range(12):
            info = PngInfo()
            info.add_text("parameters", f"model {model}")
            Image.new("RGB", (32, 32), colour).save(tmp_path / model / f"{i:02}.png", pnginfo=info)
            (tmp_path / model / f"{i:02}.txt").write_text(f"prompt {i}\n")
    return {model: tmp_path / model for model in COLOURS}


@pytest.fixture(scope="module")
def postgres():
    """A URL of an own PostgreSQL server, which listens on a socket in its own folder only."""
    places = os.pathsep.join([os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])
    initdb, pg_ctl = (shutil.which(name, path=places) for name in ("initdb", "pg_ctl"))
    if initdb is None or pg_ctl is None:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders are closed to other users
        user = {}
        if os.geteuid() == 0:  # PostgreSQL does not run as root
            user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(folder, "postgres", "postgres")

        def do(*command: str) -> None:
            subprocess.run(command, cwd=folder, check=True, timeout=120, stdout=subprocess.DEVNULL, **user)

        data = f"{folder}/data"
        do(initdb, "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        do(pg_ctl, "-D", data, "-w", "-l", f"{folder}/log", "-o", f"-k {folder} -c listen_addresses=", "start")
        yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        do(pg_ctl, "-D", data, "-w", "-m", "immediate", "stop")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """An empty database of each kind; PostgreSQL only where it is installed."""
    if request.param == "sqlite":
        yield str(tmp_path / "s.db")
        return
    url = request.getfixturevalue("postgres")
    yield url
    engine = create_engine(url)
    Base.metadata.drop_all(engine)
    engine.dispose()


def study_of(folders, database, per_rater: int = 20, repeat_every: int = 5) -> Study:
    return Study(Entries(folders), Store(str(database)), "Which?", per_rater, repeat_every, seed=0)


def likes(client: TestClient, pair: dict, model: str) -> str:
    """The side on which a model's colour is."""
    for side in ("left", "right"):
        with Image.open(io.BytesIO(client.get(pair[side]).content)) as image:
            if image.getpixel((0, 0)) == COLOURS[model]:
                return side
    raise AssertionError("neither side shows the model")


# ------------------------------------------------------------------------------------------ scores
def test_two_models_differ_by_the_log_of_their_odds():
    wins = np.array([[0.0, 30.0], [10.0, 0.0]])
    scores = bradley_terry(wins, prior=1e-9)
    assert scores[0] - scores[1] == pytest.approx(np.log(3), abs=1e-6)
    assert scores.sum() == pytest.approx(0, abs=1e-9)


def test_scores_come_back_from_the_wins_they_predict():
    truth = np.array([1.0, 0.2, -0.4, -0.8])
    chance = 1 / (1 + np.exp(truth[None, :] - truth[:, None]))
    np.fill_diagonal(chance, 0)
    np.testing.assert_allclose(bradley_terry(1000 * chance, prior=1e-9), truth, atol=1e-5)


def test_a_model_that_never_lost_has_a_finite_score():
    scores = bradley_terry(np.array([[0.0, 20.0], [0.0, 0.0]]))
    assert np.isfinite(scores).all() and scores[0] > 2


@pytest.mark.parametrize("draw", range(3))
def test_scores_are_the_most_likely_ones_however_unbalanced_the_votes(draw):
    joined = np.zeros((4, 4))  # two pairs of a thousand votes each, and one vote from pair to pair
    joined[0, 1] = joined[1, 0] = joined[2, 3] = joined[3, 2] = 500
    joined[1, 2] = 1
    never_lost = np.array([[0.0, 20.0, 0.0, 3.0], [0.0, 0.0, 1.0, 0.0], [0.0] * 4, [0.0, 4.0, 2000.0, 0.0]])
    wins = [joined, never_lost, np.random.default_rng(0).poisson(2.0, (4, 4)) * (1 - np.eye(4))][draw]

    def unlikely(scores: np.ndarray) -> float:
        lost = np.logaddexp(0, scores[None, :] - scores[:, None])  # -log of the chance that i beats j
        return (wins * lost).sum() + 0.05 * (np.logaddexp(0, scores) + np.logaddexp(0, -scores)).sum()

    best = optimize.minimize(unlikely, np.zeros(4), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12, "maxiter": 20_000, "maxfev": 20_000}).x  # fmt: skip
    np.testing.assert_allclose(bradley_terry(wins), best - best.mean(), atol=1e-4)
    resampled = np.stack([wins, 2 * wins.T])
    np.testing.assert_allclose(bradley_terry(resampled)[0], bradley_terry(wins), atol=1e-9)


def test_scores_that_did_not_converge_are_not_told():
    with pytest.raises(ValueError, match="2 models did not converge in 3 steps"):
        bradley_terry(np.array([[0.0, 1000.0], [0.0, 0.0]]), iterations=3)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(40):
        votes = [_vote(str(i), "a" if rng.random() < 0.7 else "b") for i in range(100)]
        rate = analyse(votes, resamples=200, seed=trial).win_rates["one", "two"]
        covered += rate.low <= 0.7 <= rate.high
    assert covered >= 34  # of 40; 38 are expected, fewer than 34 by chance in one of 100 such tests


def _vote(name: str, choice: str, repeat: int = 0, rater: str = "r", a_is_left: bool = True):
    from evaluation.study.store import Showing, now

    return Showing(
        ticket=f"{rater}{name}{repeat}", rater=rater, name=name, model_a="one", model_b="two", repeat=repeat,
        a_is_left=a_is_left, shown=now(), choice=choice, answered=now(), seconds=1.0, caption="",
    )  # fmt: skip


def test_second_looks_tell_steadiness_and_do_not_count_as_votes():
    votes = [_vote("1", "a"), _vote("2", "b"), _vote("3", "tie"), _vote("1", "a", 1), _vote("2", "a", 1)]
    results = analyse(votes)
    assert results.votes == {("one", "two"): 3} and results.ties == 1
    assert results.win_rates["one", "two"].value == 0.5
    assert (results.second_looks, results.agreement) == (2, 0.5)
    assert "| one over two | 3 | 50.0% |" in as_text(results)
    with pytest.raises(ValueError, match="no votes"):
        analyse([])


# ------------------------------------------------------------------------------------------ which pair comes next
def test_pairs_with_the_fewest_votes_come_first(folders, database):
    store = Store(database)
    entries = Entries(folders)
    assignment = Assignment(entries, store, per_rater=100, repeat_every=0, rng=random.Random(0))
    for _ in range(3):
        rater = store.add_rater()
        while showing := assignment.next(rater):
            store.answer(showing.ticket, "a", 1.0)
            counts = store.counts()
            assert max(counts.values()) - min(counts.get(one, 0) for one in entries.comparisons) <= 1
    assert set(store.counts().values()) == {3}
    sides = [vote.a_is_left for vote in store.votes()]
    assert 0 < sum(sides) < len(sides)


def test_a_second_look_changes_sides_and_comes_late(folders, tmp_path):
    store = Store(str(tmp_path / "s.db"))
    assignment = Assignment(Entries(folders), store, per_rater=15, repeat_every=5, rng=random.Random(0))
    rater = store.add_rater()
    while showing := assignment.next(rater):
        store.answer(showing.ticket, "tie", 1.0)
    shown = store.of(rater)
    # the fifth would be too soon; after the twelve pairs there and the second look nothing is left
    assert [i for i, one in enumerate(shown) if one.repeat] == [9] and len(shown) == 13
    for i, one in enumerate(shown):
        if one.repeat:
            first = next(j for j, other in enumerate(shown) if other.comparison == one.comparison)
            assert i - first > 4 and shown[first].a_is_left != one.a_is_left


# ------------------------------------------------------------------------------------------ over HTTP
def test_votes_survive_a_restart_and_waiting_pairs_are_shown_again(folders, database, tmp_path):
    client = TestClient(make_app(study_of(folders, database)))
    client.get("/")
    pair = client.get("/api/next").json()["pair"]
    for _ in range(5):
        choice = likes(client, pair, "red")
        pair = client.post("/api/vote", json={"ticket": pair["ticket"], "choice": choice, "seconds": 1.5}).json()[
            "pair"
        ]
    again = TestClient(make_app(study_of(folders, database)), cookies={COOKIE: client.cookies[COOKIE]})
    assert again.get("/api/next").json()["pair"]["ticket"] == pair["ticket"]
    turned = dict(reversed(folders.items()))
    assert Entries(turned).comparisons == Entries(folders).comparisons, "in whatever order the folders are named"
    votes = Store(database).votes()
    assert [(vote.choice, vote.model_b) for vote in votes] == [("b", "red")] * 5
    assert write_csv(votes, tmp_path / "votes.csv") == 5
    with (tmp_path / "votes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["winner"] for row in rows} == {"red"} and all(row[row["choice"]] == "red" for row in rows)
    assert rows[0]["caption"].startswith("prompt ") and rows[0]["seconds"] == "1.50"


def test_nothing_a_browser_gets_names_a_model(folders, tmp_path):
    client = TestClient(make_app(study_of(folders, tmp_path / "s.db")))
    client.get("/")
    state = client.get("/api/next")
    files = [client.get(state.json()["pair"][side]) for side in ("left", "right")]
    for answer in (state, *files):
        told = answer.content + str(dict(answer.headers)).encode()
        assert b"red" not in told.replace(b"answered", b"") and b"blue" not in told


def test_forged_and_foreign_votes_are_refused(folders, tmp_path):
    study = study_of(folders, tmp_path / "s.db")
    client, other = TestClient(make_app(study)), TestClient(make_app(study))
    vote = {"ticket": "0" * 32, "choice": "left", "seconds": 1.0}
    assert client.post("/api/vote", json=vote).status_code == 403  # who is that?
    client.get("/")
    other.get("/")
    assert client.post("/api/vote", json=vote).status_code == 404
    ticket = client.get("/api/next").json()["pair"]["ticket"]
    assert other.post("/api/vote", json=vote | {"ticket": ticket}).status_code == 403
    assert other.get(f"/image/{ticket}/left").status_code == 403
    for wrong in ({"choice": "red"}, {"seconds": -1.0}, {"ticket": "../../etc"}, {"more": 1}, {"seconds": "1"}):
        assert client.post("/api/vote", json=vote | {"ticket": ticket} | wrong).status_code == 422
    forged = TestClient(make_app(study), cookies={COOKIE: "f" * 32})
    assert forged.get("/api/next").status_code == 403
    store = study.store
    unknown = store.show(store.add_rater(), Comparison("99", "red", "blue"), 0, True, "")
    mine = TestClient(make_app(study), cookies={COOKIE: unknown.rater})
    assert mine.post("/api/vote", json=vote | {"ticket": unknown.ticket}).status_code == 404
    assert store.votes() == []


def test_an_answer_can_be_taken_back(folders, database):
    study = study_of(folders, database)
    client = TestClient(make_app(study))
    client.get("/")
    assert client.post("/api/back", json={}).status_code == 409
    pair = client.get("/api/next").json()["pair"]
    client.post("/api/vote", json={"ticket": pair["ticket"], "choice": "left", "seconds": 1.0})
    back = client.post("/api/back", json={}).json()["pair"]
    assert back["ticket"] == pair["ticket"] and back["number"] == pair["number"]
    client.post("/api/vote", json={"ticket": pair["ticket"], "choice": "tie", "seconds": 1.0})
    assert [vote.choice for vote in study.store.votes()] == ["tie"]


def test_many_at_once_lose_no_vote(folders, database):
    study = study_of(folders, database, per_rater=12, repeat_every=0)
    app = make_app(study)

    def rate() -> None:
        client = TestClient(app)
        client.get("/")
        pair = client.get("/api/next").json()["pair"]
        while pair:
            body = {"ticket": pair["ticket"], "choice": "right", "seconds": 0.1}
            pair = client.post("/api/vote", json=body).json()["pair"]

    raters = [threading.Thread(target=rate) for _ in range(6)]
    for rater in raters:
        rater.start()
    for rater in raters:
        rater.join()
    assert len(study.store.votes()) == 6 * 12 and set(study.store.counts().values()) == {6}


# ------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    "images, said",
    [
        (("red={red}",), "at least 2 models, got 1"),
        (("red={red}", "blue"), "write name=folder"),
        (("red={red}", "red={blue}"), "two models named 'red'"),
        (("red={red}", "blue=/nowhere"), "there is no such folder"),
    ],
)
def test_mistakes_are_named(folders, images, said):
    with pytest.raises(ConfigError, match=said):
        Entries(read_folders(tuple(option.format(**folders) for option in images)))


def test_the_job_says_what_is_missing_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "jobs/study.py", "results", "--database", str(tmp_path / "none.db")],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "there is no such file" in done.stderr
    with pytest.raises(ConfigError, match="--database nonsense://x"):
        Store("nonsense://x")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "host:port"])  # nobody listens; no port
def test_a_password_is_not_printed(address):
    with pytest.raises(ConfigError, match=r"--database postgresql\+psycopg://") as raised:
        Store(f"postgresql+psycopg://rater:secret@{address}/votes")
    assert "secret" not in str(raised.value)


def test_the_tables_can_be_made_in_postgresql():
    for table in Base.metadata.sorted_tables:
        said = str(CreateTable(table).compile(dialect=postgresql.dialect()))
        assert f"CREATE TABLE {table.name}" in said and "DATETIME" not in said


def test_votes_are_of_the_pictures_they_were_given_for(folders, database):
    entries, store = Entries(folders), Store(database)
    store.keep_pictures(entries.hashes())
    Store(database).keep_pictures(entries.hashes())
    changed = entries.pictures["red"][entries.names[0]]
    Image.new("RGB", (8, 8), "green").save(changed)
    with pytest.raises(ConfigError, match=f"1 pictures are not those .* first {entries.names[0]} of red"):
        store.keep_pictures(Entries(folders).hashes())


# ------------------------------------------------------------------------------------------ in a browser
@pytest.fixture
def url(folders, tmp_path):
    config = uvicorn.Config(make_app(study_of(folders, tmp_path / "s.db", per_rater=8)), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        pass
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def launched(playwright):
    """Debian's Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.mark.parametrize("size", [(390, 844), (1280, 800)], ids=["phone", "desktop"])
def test_in_chromium_by_keyboard_and_by_touch(url, tmp_path, size):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = launched(playwright)
        page, wrong = browser.new_page(viewport={"width": size[0], "height": size[1]}), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith((url, "data:")) else wrong.append(request.url)
        )
        page.goto(url)

        def expect_count(number: int) -> None:
            sync_api.expect(page.locator("#count")).to_have_text(f"{number} of 8", timeout=20_000)
            sync_api.expect(page.locator(".answer").first).to_be_enabled(timeout=20_000)  # pictures are there

        expect = sync_api.expect
        expect_count(1)
        expect(page.locator("#question")).to_have_text("Which?")
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        boxes = [page.locator(side).bounding_box() for side in ("#left", "#right")]
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["width"] > 120  # side by side, on a phone too
        assert page.locator(".answer").last.bounding_box()["y"] < size[1]  # no scrolling to answer
        for number, answer in enumerate(("ArrowLeft", "ArrowRight", "ArrowDown", "click", "image"), 2):
            if answer == "click":
                page.click(".answer[data-choice='tie']")
            elif answer == "image":
                page.click(".picture[data-choice='right']")
            else:
                page.keyboard.press(answer)
            expect_count(number)
        page.keyboard.press("Backspace")
        expect_count(5)
        for number in (6, 7, 8):
            page.keyboard.press("ArrowLeft")
            expect_count(number)
        page.reload()
        expect_count(8)
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#thanks")).to_be_visible()
        browser.close()
    assert wrong == []
    votes = Store(str(tmp_path / "s.db")).votes()
    assert len(votes) == 8 and all(vote.seconds < 60 for vote in votes)


def test_a_pair_that_was_not_seen_gets_no_vote(url, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = launched(playwright)
        page = browser.new_page()
        page.route("**/image/**", lambda route: route.abort())
        page.goto(url)
        wrong = page.locator("#wrong")
        sync_api.expect(wrong).to_contain_text("a picture could not be loaded", timeout=20_000)
        page.unroute("**/image/**")
        page.keyboard.press("ArrowLeft")  # tries again, and is no vote
        sync_api.expect(wrong).to_be_hidden(timeout=20_000)
        sync_api.expect(page.locator("#count")).to_have_text("1 of 8")
        sync_api.expect(page.locator(".answer").first).to_be_enabled(timeout=20_000)
        assert Store(str(tmp_path / "s.db")).votes() == []
        page.keyboard.press("ArrowLeft")
        sync_api.expect(page.locator("#count")).to_have_text("2 of 8", timeout=20_000)
        browser.close()
    assert len(Store(str(tmp_path / "s.db")).votes()) == 1
