"""The report is made from whatever a run left, escapes what it shows, and asks nothing of anyone."""

from __future__ import annotations

import json
import re
import shutil

import yaml

from hydratune import report
from hydratune.card import origin, write_card
from hydratune.report import write_report

HOSTILE = "<script>alert('x')</script> & \"quotes\" [b]"
SUMMARY = {
    "run_name": HOSTILE, "status": "completed", "algo": "sft", "model": "tiny", "data": "arithmetic", "peft": "none",
    "objective": {"name": "eval_loss", "value": 1.0}, "metrics": {"final": {"loss": 1.5, "eval_loss": 1.0}, "best": {"loss": 1.2}},
    "steps": 3, "tokens": 1234, "seconds": {"training": 61.0}, "tokens_per_second": 20.0, "peak_memory": {"bytes": 2**30, "kind": "host"},
    "seed": 1, "device": "CPU", "versions": {"torch": "2.13"}, "git_commit": None, "command": f"python train.py {HOSTILE}",
}  # fmt: skip


def fill(folder, *, events=3, torn=False):
    lines = [
        json.dumps(
            {
                "step": i + 1,
                "loss": 2.0 - i / 3,
                "eval_loss": 2.1 - i / 3,
                "learning_rate": 1e-3,
                "grad_norm": None,
            }
        )
        for i in range(events)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + ('\n{"step": 9, "lo' if torn else "\n"))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"model": {"name_or_path": HOSTILE}, "lr": 0.1, "empty": None})
    )
    (folder / "samples.jsonl").write_text(
        json.dumps({"prompt": HOSTILE, "completion": "  4\n5", "reference": "4", "correct": False})
    )


def test_what_is_shown_is_escaped_and_nothing_is_requested(tmp_path):
    fill(tmp_path)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.findall(r"""(?:src|href)=["']?(?!#)[^"'> ]+""", page)
    assert not re.findall(r"url\((?!#)[^)]+\)", page) and "@import" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert "<b>1.5000</b><span>training loss, best 1.2000</span>" in page
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_charts_hold_the_data_and_their_ids_do_not_clash(tmp_path):
    fill(tmp_path)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2  # loss with eval_loss, learning rate; grad_norm was never a number
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert all(f'id="{target}"' in page for target in re.findall(r'xlink:href="#([^"]+)"', page))
    assert "var(--train)" in page and "var(--eval)" in page


def test_torn_and_missing_files_never_fail_it(tmp_path):
    fill(tmp_path, torn=True)
    write_report(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    write_report(bare)
    assert "No metric was logged" in (bare / "report.html").read_text()
    (bare / "summary.json").write_text("{torn")
    (bare / "config.yaml").write_text(": : :")
    (bare / "samples.jsonl").write_text("{torn")
    write_report(bare)


def test_one_step_is_drawn(tmp_path):
    fill(tmp_path, events=1)
    write_report(tmp_path)
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_memory_is_in_the_picture_of_a_run_with_many_charts(tmp_path, monkeypatch):
    event = {name: 1.0 for _, names in report.CHARTS for name in names}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **event}) + "\n")
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axes, title, **_: titles.append(title))
    report.render(tmp_path)
    assert len(titles) == 8 and titles[0] == "Mean reward" and titles[-1] == "Peak memory (GiB)"


def test_values_that_hardly_differ_are_drawn_on_an_axis_of_plain_numbers(tmp_path):
    events = [{"step": i, "loss": 5.496934 + i * 1e-7} for i in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    write_report(tmp_path)
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "report.html").read_text())
    assert labels and not [
        label for label in labels if "+" in label
    ]  # no 1e−7+5.496934 that the reader adds to
    assert {"5.490", "5.495", "5.500", "5.505"} & set(labels) and all(len(label) <= 7 for label in labels)


def test_of_an_empty_completion_it_is_said_that_it_is_empty(tmp_path):
    rows = [
        {"prompt": "a", "completion": ""},
        {"prompt": "b", "completion": " \n"},
        {"prompt": "c", "score": 0},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'<p class="none">(.*?)</p>', page) == ["nothing", "only white space"]
    assert "<pre>0</pre>" in page


def front_matter(folder) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_a_card_names_a_hub_base_and_hides_a_local_one(tmp_path):
    fill(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    for base, shown in (("Qwen/Qwen2.5-0.5B", True), (str(tmp_path), False)):
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump({"model": {"name_or_path": base}, "algo": {"packing": True}})
        )
        write_card(model, tmp_path)
        assert (front_matter(model).get("base_model") == base) is shown
        assert shown or str(tmp_path.parent) not in (model / "README.md").read_text()
    assert front_matter(model)["library_name"] == "transformers"
    (model / "adapter_config.json").write_text("{}")
    write_card(model, tmp_path)
    assert front_matter(model)["library_name"] == "peft"
    text = (model / "README.md").read_text()
    assert (
        "| evaluation loss | 1.0000 |" in text and "AutoPeftModelForCausalLM" in text and "torch 2.13" in text
    )


def a_run(folder, base):
    """A finished run with a model."""
    folder.mkdir()
    fill(folder)
    summary = SUMMARY | {"run_name": folder.name, "base": origin(base)}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"name_or_path": base}}))
    (folder / "model").mkdir()
    write_card(folder / "model", folder)
    return folder / "model"


def test_a_base_that_is_a_run_is_named_by_the_run_and_by_what_the_hub_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "first", "Qwen/Qwen2.5-0.5B")
    a_run(tmp_path / "second", "first/model")
    a_run(tmp_path / "third", "second/checkpoints/checkpoint-2")  # which is gone by now
    a_run(tmp_path / "fresh", None)
    shutil.copytree(tmp_path / "second" / "model", tmp_path / "exported")  # a model without a run
    assert origin("exported") == {"name": "exported", "hub": "Qwen/Qwen2.5-0.5B"}
    a_run(tmp_path / "fourth", "fresh/model")
    (tmp_path / "moved").mkdir()
    for name in ("first", "second", "third", "fourth"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    monkeypatch.chdir("/")  # from where no relative path leads there
    said = {}
    for name in ("first", "second", "third", "fourth"):
        run = tmp_path / "moved" / name
        write_card(run / "model", run)  # as `hydratune export` does
        text = (run / "model" / "README.md").read_text()
        said[name] = (
            front_matter(run / "model").get("base_model"),
            text.split("\n\n")[2].split(" trained")[0],
        )
        assert "/model" not in text.replace("from_pretrained", "")
    assert said == {
        "first": ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        "second": ("Qwen/Qwen2.5-0.5B", "first (from Qwen/Qwen2.5-0.5B)"),
        "third": (None, "checkpoint-2"),
        "fourth": (None, "fresh"),
    }


def test_a_run_without_a_note_of_its_base_never_names_a_folder_as_a_hub_id(tmp_path):
    """Cards of runs made before that note was kept."""
    fill(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"name_or_path": "outputs/sums/model"}}))
    (tmp_path / "model").mkdir()
    write_card(tmp_path / "model", tmp_path)
    assert "base_model" not in front_matter(tmp_path / "model")
    assert "sums trained with" in (tmp_path / "model" / "README.md").read_text()


def test_a_value_that_was_not_finite_is_left_out(tmp_path):
    fill(tmp_path)
    torn = SUMMARY | {"metrics": {"final": {"loss": None, "eval_loss": 1.0}, "best": {"eval_loss": None}}}
    (tmp_path / "summary.json").write_text(json.dumps(torn))
    write_report(tmp_path)
    assert "evaluation loss" in (tmp_path / "report.html").read_text()
