"""What the dashboard serves of a folder: what is there, what is drawn when it is missing, and nothing else."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, quote

import pytest

pytest.importorskip("optuna_dashboard", reason="needs the extra [dashboard]")
from test_dashboard_library import run
from test_dashboard_studies import make
from werkzeug.test import Client

from hydratune import report
from hydratune.dashboard.library import Library, chosen
from hydratune.dashboard.page import _study
from hydratune.dashboard.server import application
from hydratune.dashboard.studies import Curves, Studies
from hydratune.runs import find_runs, find_studies
from hydratune.sweep.page import page
from hydratune.whole import write_whole

NOBODY = 65534
FACTS = {
    "name": "s", "objectives": ["eval_loss"], "directions": ["minimize"], "space": {}, "sampler": "grid", "pruner": "none",
    "front": [0], "commands": {},
    "trials": [{"number": 0, "state": "complete", "values": [1.0], "settings": {"lr": 0.1}, "params": {"lr": 0.1}, "intermediate": {},
                "started": 1.0, "ended": 2.0, "seconds": 1.0, "reason": ""}],
}  # fmt: skip


def get(home, path):
    return Client(application(home)).get(path, headers={"Host": "127.0.0.1"})


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def only_read(folder: Path):
    """Nothing below the folder can be written; root, who could, is another user meanwhile."""
    everything = [folder, *folder.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if was_root := os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        with pytest.raises(PermissionError):
            (folder / "new").write_text("")
        yield
    finally:
        if was_root:
            os.seteuid(0)
        for path in everything:
            path.chmod(0o755)


@pytest.fixture
def readable():
    """A folder that every user can reach, which a temporary one of pytest's is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("kept", ["journal", "database"])
def test_what_can_only_be_read_is_shown(readable, kept):
    home = readable / "outputs"
    storage = f"sqlite:///{readable / 'all.db'}" if kept == "database" else None
    make(home / "s", 3, storage=storage)
    run(home / "s" / "1x", losses=[2.0, 1.0])
    (home / "s" / "study.json").write_text(json.dumps(FACTS))
    first = run(readable / "first", losses=[2.0])  # what is imported on the way may be for root's eyes
    (first / "study.json").write_text(json.dumps(FACTS))
    report.render(first)
    page(first, FACTS)
    before = listing(readable)
    with only_read(readable):
        union = Studies(home)
        (study,) = union.get_all_studies()
        assert union.unreadable == {} and len(union.get_all_trials(study._study_id)) == 3
        assert Curves(union).open_reader("1-0").read(4) == b"\x89PNG"
        for path, told in (("s", "History"), ("s/0", "Loss"), ("s/1x", "Loss")):
            answer = get(home, f"/runs/{path}/report.html")
            assert answer.status_code == 200 and f"<figcaption>{told}" in answer.text
        assert get(home, "/runs/s/1x/curves.png").data[:4] == b"\x89PNG"
    assert listing(readable) == before


def test_a_report_that_is_missing_is_drawn_and_kept_once_its_run_has_ended(tmp_path):
    run(tmp_path / "done", losses=[2.0, 1.0])
    run(tmp_path / "live", losses=[2.0, 1.0], summary=False)
    for name in ("done", "live"):
        assert "<svg" in get(tmp_path, f"/runs/{name}/report.html").text
    assert (tmp_path / "done" / "report.html").is_file()
    assert not (tmp_path / "live" / "report.html").exists()  # it would not be what the run is by then
    for missing in ("none/report.html", "report.html", "done/other.html", "done/.hydra/report.html"):
        assert get(tmp_path, f"/runs/{missing}").status_code == 404


def test_links_lead_neither_out_nor_in_a_circle(tmp_path):
    home = tmp_path / "outputs"
    run(home / "a", losses=[2.0])
    run(tmp_path / "elsewhere" / "b", losses=[2.0])
    (tmp_path / "secret").write_text("a text of another folder")
    (home / "s").mkdir()
    (home / "s" / ".study").write_text("x")
    links = {
        "a again": home / "a", "s again": home / "s", "a/up": home, "parent": tmp_path, "out": tmp_path / "elsewhere", "b": tmp_path / "elsewhere" / "b",
        "a/secret": tmp_path / "secret", "itself": home / "itself", "to": home / "fro", "fro": home / "to", "a/gone": home / "none",
        "inside.yaml": home / "a" / "config.yaml",
    }  # fmt: skip
    for name, target in links.items():
        (home / name).symlink_to(target)
    assert [found.name for found in find_runs(home)] == ["a"]
    assert find_studies(home) == [home / "s"]
    assert [found.name for found in Library(home).runs()] == ["a"]
    for path in (
        "parent/",
        "parent/secret",
        "out/",
        "out/b/config.yaml",
        "b/report.html",
        "a/secret",
        "itself",
        "to/",
        "a/gone",
        "%00",
        "a/x%00",
    ):
        answer = get(home, f"/runs/{path}")
        assert answer.status_code == 404 and "another folder" not in answer.text, path
    assert get(home, "/runs/a/up/a/up/a/config.yaml").status_code == 200  # in a circle, and inside
    assert get(home, "/runs/inside.yaml").status_code == 200
    shown = get(home, "/runs/").text + get(home, "/runs/a/").text
    assert [name for name in links if f">{Path(name).name}" in shown] == [
        "a again",
        "s again",
        "a/up",
        "inside.yaml",
    ]
    (tmp_path / "link").symlink_to(home)  # the folder that is shown may be one
    assert [found.name for found in find_runs(tmp_path / "link")] == ["a"]
    assert get(tmp_path / "link", "/runs/a/config.yaml").status_code == 200


def test_a_report_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    folder = run(tmp_path / "a", losses=[2.0])
    report.write_report(folder)
    before = listing(folder)
    real = Path.replace

    def seen(part, target):
        assert listing(folder)[target.name] == before[target.name]  # old until it is replaced
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", seen)
    with pytest.raises(OSError, match="No space"):
        report.write_report(folder)
    assert listing(folder) == before  # nor is a part left
    monkeypatch.setattr(Path, "replace", real)
    write_whole(folder / "report.html", "new")
    assert (folder / "report.html").read_text() == "new" and set(listing(folder)) == set(before)


def test_the_runs_of_a_study_are_found_whatever_it_is_called(tmp_path):
    name = 'the sweep\'s "best" = 1 & more'
    make(tmp_path / name, 2)
    run(tmp_path / name / "0x", losses=[2.0])
    run(tmp_path / "other", losses=[2.0])
    union = Studies(tmp_path)
    (study,) = union.get_all_studies()
    note = union.get_study_system_attrs(study._study_id)["dashboard:note_str:0"]
    listed = re.search(r'href="(/\?filter=[^"]*)"', get(tmp_path, f"/runs/{quote(name)}/").text)[1]
    noted = re.search(r"\((/\?filter=[^)]*)\)", note)[1]
    for address in (noted, listed, _study(union, union.places()[0])["runs"]):
        (asked,) = parse_qs(html.unescape(address).partition("?")[2])["filter"]
        assert [r.name for r in chosen(Library(tmp_path).runs(), asked)] == [f"{name}/0x"]


def test_names_that_no_file_can_have_are_not_found(tmp_path, monkeypatch):
    run(tmp_path / "a", losses=[2.0])
    for name in ("x" * 300, "a/" + "x" * 300, "x" * 5000, "%00", "x/" * 3000):
        assert get(tmp_path, f"/runs/{name}").status_code == 404
    real = Path.stat

    def stat(path, **options):
        if path.name == "gone":
            raise PermissionError(path)
        return real(path, **options)

    (tmp_path / "a" / "gone").write_text("")
    monkeypatch.setattr(Path, "stat", stat)
    shown = get(tmp_path, "/runs/a/")
    assert shown.status_code == 200 and "metrics.jsonl" in shown.text and "gone" not in shown.text
