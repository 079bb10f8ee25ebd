"""The commands of `hydratune`, on runs that were trained here: what is typed, what is printed, which numbers."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, greedy, run
from commands import train as sweep
from fake_vllm import FakeVLLM
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hydratune.commands import doctor
from hydratune.commands.doctor import packages
from hydratune.commands.evaluation import mean, win_rate

PROGRAM = str(Path(sys.executable).parent / "hydratune")
COMMANDS = ["runs", "compare", "chat", "generate", "eval", "export", "merge", "doctor"]


def summary(home, name):
    return json.loads((home / name / "summary.json").read_text())


def given(home, name, *arguments, **kwargs):
    """JSON of a command about one run."""
    return json.loads(run(*arguments[:1], home / name, *arguments[1:], "--json", **kwargs)[0])


# ------------------------------------------------------------------ runs, compare


def test_runs_lists_what_was_trained_the_newest_first(home):
    out, _ = run("runs", "--home", home)
    assert out.splitlines()[-1] == "5 runs"
    names = [line.split()[1] for line in out.splitlines()[1:6]]
    assert names == ["preference", "judge", "online", "adapter", "whole"]
    assert "\x1b" not in out and not any(line.endswith(" ") for line in out.splitlines())
    out, _ = run("runs", "--home", home, "algo=sft", "lr<0.01", "--columns", "peft,eval_loss")
    header, line, count = out.splitlines()
    assert header.split()[:5] == ["status", "name", "algo", "peft", "eval_loss"] and count == "1 of 5 runs"
    assert line.split()[:4] == ["completed", "whole", "sft", "none"]


def test_runs_sorts_by_what_is_better(home):
    lists = {
        key: [r["name"] for r in json.loads(run("runs", "--home", home, "--json", "--sort", key)[0])]
        for key in ("eval_mean_token_accuracy", "lr")
    }
    assert lists["eval_mean_token_accuracy"][:2] == ["whole", "adapter"] and lists["lr"][-1] == "adapter"
    facts = json.loads(run("runs", "--home", home, "--json", "peft=lora", "algo=sft")[0])
    assert facts[0]["settings"]["peft.r"] == 16
    assert facts[0]["metrics"] == summary(home, "adapter")["metrics"]["final"]


def test_compare_tells_what_differs_and_marks_the_better(home):
    out, _ = run("compare", "whole", "adapter", "--home", home)
    cells = {line.split("  ")[0]: line for line in out.splitlines()}
    assert cells["lr"].split() == ["lr", "0.002", "0.02"] and cells["peft.type"].split() == [
        "peft.type",
        "–",
        "lora",
    ]
    value = summary(home, "whole")["metrics"]["final"]["eval_mean_token_accuracy"]
    assert re.search(rf"{value:.4g} ★ +0\.", cells["eval_mean_token_accuracy"])
    found = json.loads(
        run("compare", "whole", "adapter", "--home", home, "--json", "--metric", "eval_loss")[0]
    )
    assert found["best"] == {"eval_loss": ["whole"]} and [*found["metrics"]] == ["eval_loss"]


def test_losses_of_different_algorithms_are_not_held_against_each_other(home):
    out, _ = run("compare", "whole", "judge", "--home", home)
    assert "★" not in next(line for line in out.splitlines() if line.startswith("eval_loss"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A real sweep over three learning rates."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny = [
        "data.size=64",
        "batch_size=8",
        "tracking=none",
        "tracking.samples=0",
        "model.architecture.num_hidden_layers=1",
    ]
    sweep("-m", "lr=1e-5,3e-3,1e-3", "max_steps=3", "sweep.name=rates", *tiny, cwd=folder)
    return folder / "outputs" / "sweeps" / "rates"


def test_compare_takes_a_study_for_its_trials(study, home):
    facts = json.loads((study / "study.json").read_text())
    values = [trial["values"][0] for trial in facts["trials"]]
    for words in (
        [study],
        ["rates", "--home", study.parents[1]],
        ["sweeps/rates", "--home", study.parents[1]],
    ):
        found = json.loads(run("compare", *words, "--json")[0])
        assert found["runs"] == ["0", "1", "2"] and found["settings"]["lr"] == [1e-5, 3e-3, 1e-3]
        assert [o["value"] for o in found["objective"]] == values
        assert found["best"]["eval_loss"] == [str(values.index(min(values)))]
    out, _ = run("compare", study, "whole", "--home", home)  # and a run beside them
    assert out.splitlines()[0].split() == ["0", "1", "2", "whole"]


def test_the_summary_of_a_run_is_written_after_its_last_metric(study, home):
    """So that commands and pages need not read the metrics of what has ended."""
    for folder in (study / "0", home / "whole", home / "judge"):
        logged = json.loads((folder / "summary.json").read_text())["logged_bytes"]
        assert logged == (folder / "metrics.jsonl").stat().st_size > 0


def test_compare_takes_the_trials_of_a_study_that_has_only_begun(study, tmp_path, home):
    """study.json is there after a first result; the trials are seen from their first moment."""
    begun = tmp_path / "sweeps" / "begun"
    begun.mkdir(parents=True)
    shutil.copy(study / ".study", begun)
    words = ["compare", "begun", "--home", tmp_path]
    out, error = run(*words, code=2)
    assert (
        error.count("error") == 1 and "no trial of this study has begun" in error and "→" in error and not out
    )
    for name in ("0", "1"):
        shutil.copytree(study / name, begun / name, ignore=shutil.ignore_patterns("model", "checkpoints"))
        (begun / name / "summary.json").unlink()
        if name == "0":
            out, error = run(*words, code=2)
            assert error.count("error") == 1 and "only one trial" in error and "→" in error and not out
            out, _ = run("compare", begun, home / "whole")  # with another run it is enough
            assert out.splitlines()[0].split() == ["0", str(home / "whole")]
    found = json.loads(run(*words, "--json")[0])
    assert found["runs"] == ["0", "1"] and set(found["status"]) <= {"running", "stopped"}
    assert found["settings"]["lr"] == [1e-5, 3e-3] and all(found["metrics"]["eval_loss"])


# ------------------------------------------------------------------ eval


def test_eval_gives_the_runs_own_numbers(home):
    found, final = given(home, "whole", "eval"), summary(home, "whole")["metrics"]["final"]
    assert found["metrics"]["loss"] == pytest.approx(final["eval_loss"], rel=1e-6)
    assert found["metrics"]["mean_token_accuracy"] == pytest.approx(
        final["eval_mean_token_accuracy"], rel=1e-6
    )
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(final["eval_loss"]), rel=1e-6)
    assert 0 < final["verified_accuracy"] < 1
    right = found["verified_accuracy"]
    assert right["mean"] == final["verified_accuracy"] and right["count"] == found["rows"] == 64
    p = right["mean"]
    assert right["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / 63))


@pytest.mark.parametrize("name", ["adapter", "judge", "preference", "online"])
def test_eval_gives_every_metric_of_the_runs_own_evaluation(home, name):
    """Of an adapter on its base, of a score head, of a policy against the model that it started from, and of one of GRPO."""
    found, final = (
        given(home, name, "eval", "--completions", 0)["metrics"],
        summary(home, name)["metrics"]["final"],
    )
    found.pop("perplexity", None)
    assert len(found) >= 3
    assert found == pytest.approx({key: final[f"eval_{key}"] for key in found}, rel=1e-5, abs=1e-6)


def test_eval_of_a_file_is_the_loss_of_all_its_rows(home, tmp_path):
    """Held against plain transformers, a row at a time: −log p of every token after the first, by the number of such tokens."""
    rows = [f"What is {a} + 1?" for a in (1, 12, 123)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    model = AutoModelForCausalLM.from_pretrained(home / "whole" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "whole" / "model")
    sums, counts = [], []
    for text in rows:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            sums.append(model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1))
        counts.append(ids.shape[1] - 1)
    loss = sum(sums) / sum(counts)
    apart = sum((s - loss * n) ** 2 for s, n in zip(sums, counts, strict=True))
    error = math.sqrt(apart * 3 / 2) / sum(counts)  # of a ratio, rows independent
    for size in (1, 3):
        found = given(home, "whole", "eval", f"data.path={file}", "--batch-size", size)
        assert (found["rows"], found["of"]) == (3, f"all of {file}")
        assert found["metrics"]["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["standard_errors"]["loss"] == pytest.approx(error, rel=1e-4)
        assert found["standard_errors"]["perplexity"] == pytest.approx(error * math.exp(loss), rel=1e-4)
        assert "verified_accuracy" not in found


def test_a_reward_model_judges_a_run_against_another(home):
    judged = given(
        home, "adapter", "eval", "--reward-model", home / "judge", "--completions", 10, "--max-new-tokens", 6
    )
    win = judged["win_rate"]
    assert judged["against"]["name"].startswith("base") and win["won"] + win["lost"] + win["tied"] == 10
    assert win["mean"] == (win["won"] + 0.5 * win["tied"]) / 10
    same = given(
        home, "adapter", "eval", "--reward-model", home / "judge", "--against", home / "adapter",
        "--completions", 10, "--max-new-tokens", 6,
    )  # fmt: skip
    assert same["reward"]["mean"] == pytest.approx(judged["reward"]["mean"], rel=1e-5)
    assert (same["win_rate"]["tied"], same["win_rate"]["mean"]) == (10, 0.5)
    assert judged["against"]["reward"]["mean"] != pytest.approx(judged["reward"]["mean"], rel=1e-3)


def test_win_rates_and_errors_are_the_textbooks():
    assert win_rate([1, 2, 3, 4], [0, 2, 4, 0]) == {
        "mean": 0.625, "standard_error": pytest.approx(0.2393568), "count": 4, "won": 2, "lost": 1, "tied": 1,
    }  # fmt: skip
    assert mean([2.0]) == {"mean": 2.0, "standard_error": None, "count": 1}


def test_what_eval_prints_has_its_numbers(home):
    out, _ = run("eval", home / "whole")
    final = summary(home, "whole")["metrics"]["final"]
    assert f"{final['eval_loss']:.4f} ± 0." in out and "64, held out of arithmetic" in out
    assert f"{final['verified_accuracy']:.1%} ±" in out


def test_eval_tells_sampled_answers_of_an_online_run_from_greedy_ones(home):
    found, final = given(home, "online", "eval"), summary(home, "online")["metrics"]["final"]
    sampled, greedy = found["metrics"]["verified_accuracy"], found["verified_accuracy"]["mean"]
    assert sampled == final["eval_verified_accuracy"] and greedy == final["verified_accuracy"]
    error = found["standard_errors"]["verified_accuracy"]  # of 64 answers that are right or wrong
    assert error == pytest.approx(math.sqrt(sampled * (1 - sampled) / 63))
    lines = [re.split(r"  +", line) for line in run("eval", home / "online")[0].splitlines()]
    names = [line[0] for line in lines]
    assert len(names) == len({*names})
    shown = {line[0]: line[-1] for line in lines}
    assert shown["verified answers, sampled"] == f"{sampled:.1%} ± {error:.1%}"
    assert shown["verified answers, greedy"].startswith(f"{greedy:.1%} ± ")
    assert shown["mean reward, sampled"].startswith(f"{final['eval_reward']:.4f} ± ")


def test_errors_of_pairs_are_those_of_their_mean(home):
    """Of a share p of n pairs: √(p (1 − p) / (n − 1))."""
    for name, key in (("judge", "accuracy"), ("preference", "rewards/accuracies")):
        found = given(home, name, "eval", "--completions", 0)
        p, pairs = found["metrics"][key], found["rows"]
        assert found["standard_errors"][key] == pytest.approx(math.sqrt(p * (1 - p) / (pairs - 1)))
        assert 0 < found["standard_errors"]["loss"] < 1


# ------------------------------------------------------------------ generate


def test_generate_completes_rows_and_keeps_their_columns(home, tmp_path):
    asked = [{"role": "user", "content": "What is 3 + 4?"}]
    rows = [
        {"id": 7, "messages": [*asked, {"role": "assistant", "content": "7"}]},
        {"prompt": "What is 12 - 5?", "id": 8},
    ]
    file, out = tmp_path / "rows.jsonl", tmp_path / "deep" / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("generate", home / "whole", "--file", file, "--out", out, "--max-new-tokens", 12)
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in made] == [7, 8] and made[0]["messages"] == rows[0]["messages"]
    assert made[0]["completion"] == greedy(home / "whole" / "model", asked, 12)
    assert made[0]["finished"] in (True, False)
    assert "is already there" in run("generate", home / "whole", "--file", file, "--out", out, code=2)[1]


def test_generate_reads_lines_and_draws_by_the_seed(home):
    command = ["generate", home / "adapter", "-", "--num", 2, "--max-new-tokens", 8]
    lines = 'What is 1 + 1?\n\n{"prompt": "x", "k": 1}\n'
    first, again, other = (run(*command, "--seed", seed, stdin=lines)[0] for seed in (1, 1, 2))
    assert first == again != other
    made = [json.loads(line) for line in first.splitlines()]
    assert [(row["prompt"], row.get("k"), row["sample"]) for row in made] == [
        ("What is 1 + 1?", None, 0), ("What is 1 + 1?", None, 1), ("x", 1, 0), ("x", 1, 1),
    ]  # fmt: skip
    assert made[0]["completion"] != made[1]["completion"]


def test_generate_asks_the_base_and_goes_on_with_raw_text(home):
    prompt = ["--prompt", "What is 20 + 3?", "--max-new-tokens", 8]
    outs = [
        run("generate", home / "adapter", *prompt, *more)[0]
        for more in ((), ("--base",), ("--base", "--raw"))
    ]
    assert len({*outs}) == 3


# ------------------------------------------------------------------ export, merge


def test_an_exported_adapter_is_a_plain_model_that_ends_its_answers(home, tmp_path):
    out = tmp_path / "model"
    run("export", home / "adapter", out)
    ids = torch.arange(40)[None]
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        adapted = (
            AutoPeftModelForCausalLM.from_pretrained(home / "adapter" / "model").eval()(input_ids=ids).logits
        )
        assert torch.allclose(adapted, plain(input_ids=ids).logits, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template and plain.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (out / "model.safetensors").is_file() and not (out / "adapter_config.json").exists()
    card = (out / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "peak memory" in card and str(home) not in card


def test_a_whole_model_and_a_reward_model_are_exported_too(home, tmp_path):
    run("export", home / "whole", tmp_path / "whole", "--dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto")
    own = AutoModelForCausalLM.from_pretrained(home / "whole" / "model")
    assert model.dtype == torch.bfloat16
    for name, value in own.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.to(torch.bfloat16)), name
    run("export", home / "judge", tmp_path / "judge")
    judge, found = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "judge", output_loading_info=True
    )
    assert judge.config.num_labels == 1 and not found["missing_keys"]
    assert "AutoModelForSequenceClassification" in (tmp_path / "judge" / "README.md").read_text()


def test_merge_is_export_without_a_card(home, tmp_path):
    run("merge", home / "adapter", tmp_path / "merged")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert "no adapter_config.json" in run("merge", home / "whole", tmp_path / "other", code=2)[1]


def test_nothing_is_pushed_without_a_login_and_then_nothing_is_made(home, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    _, said = run("export", home / "adapter", tmp_path / "model", "--push-to-hub", "me/it", code=2)
    assert "no login" in said and "hf auth login" in said and not (tmp_path / "model").exists()


def test_a_push_makes_a_private_repository_of_the_folder(home, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, **how):
            calls.append((name, how))
            return f"https://hub/{name}"

        def upload_folder(self, **how):
            calls.append(how)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    out, _ = run("export", home / "adapter", tmp_path / "model", "--push-to-hub", "me/it")
    assert calls[0] == ("me/it", {"private": True, "exist_ok": True}) and calls[1]["folder_path"] == str(
        tmp_path / "model"
    )
    assert "https://hub/me/it" in out and "secret" not in out


# ------------------------------------------------------------------ doctor


def test_doctor_says_what_can_be_trained_and_no_secret(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "s3cret" * 8)
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    out, said = run("doctor", "--json")
    found = json.loads(out)
    assert "s3cret" not in out + said and found["able"]
    verdicts = {f["name"]: f for f in found["algorithms"] + found["adapters"]}
    assert all(
        verdicts[name]["level"] == "ok" for name in ("sft", "dpo", "kto", "reward", "ppo", "grpo", "lora")
    )
    if not torch.cuda.is_available():
        assert verdicts["qlora"]["level"] == "bad" and "needs a CUDA GPU" in verdicts["qlora"]["says"]
    assert {"sdpa", "hydratune_varlen", "flash_attention_2"} <= {f["name"] for f in found["attention"]}
    text, _ = run("doctor")
    assert "training works here" in text and "\x1b" not in text


def test_doctor_ends_with_1_where_training_cannot_work(monkeypatch):
    from importlib import metadata

    real = metadata.version

    def version(name):
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "transformers" else real(name)

    monkeypatch.setattr("hydratune.commands.doctor.metadata.version", version)
    found = {f.name: f for f in packages()}
    assert (
        found["torch"].level == "bad"
        and "missing" in found["torch"].says
        and "pip install" in found["torch"].fix
    )
    assert found["transformers"].level == "bad" and found["peft"].level == "ok"
    assert "cannot work here" in run("doctor", code=1)[0]


def test_doctor_prints_what_it_knows_before_it_imports_torch(monkeypatch):
    order = []
    real = doctor.devices
    monkeypatch.setattr("hydratune.terminal.say", lambda console, text: order.append(str(text).strip()))
    monkeypatch.setattr(doctor, "devices", lambda: [order.append("(imports)"), *real()][1:])
    run("doctor")
    assert order[0] == "packages" and order.index("optional packages") < order.index("(imports)")
    assert order[order.index("(imports)") - 1] == "devices" and order[-1] == "training works here"


def test_doctor_asks_a_vllm_server(home):
    def row(*arguments):
        found = json.loads(run("doctor", "--json", *arguments)[0])["completions of PPO and GRPO"]
        return found[1]["level"], found[1]["says"], found[1]["fix"]

    level, says, fix = row()
    assert level == "note" and "vllm" in says and "pip install vllm" in fix and "vllm serve MODEL" in fix
    fake = FakeVLLM(home / "whole" / "model", name="mine", routes=("/collective_rpc",))
    with fake.listening() as url:
        level, says, fix = row("--vllm-server", url)
        assert (level, says) == ("ok", "serves mine, takes whole weights") and "--enable-lora" in fix
        fake.routes = {"/v1/completions"}
        level, says, fix = row("--vllm-server", url)
        assert level == "bad" and "takes no weights" in says and "VLLM_SERVER_DEV_MODE=1" in fix
    level, says, fix = row("--vllm-server", url)
    assert level == "bad" and "nothing answers there" in says and "vllm serve" in fix
    assert "http://HOST:PORT" in run("doctor", "--vllm-server", "localhost", code=2)[1]


# ------------------------------------------------------------------ wrong input, help, completion

WRONG = [
    ("runs --home nowhere", "no such folder"),
    ("runs lr", "is no filter"),
    ("runs lrr=1", "did you mean 'lr'?"),
    ("runs --sort eval_los", "did you mean 'eval_loss'?"),
    ("runs --columns peft,nope", "no run has it"),
    ("compare whole", "name two or more"),
    ("compare whole wholee", "did you mean 'whole'?"),
    ("compare whole adapter --metric eval_los", "did you mean 'eval_loss'?"),
    ("chat adaptr", "did you mean 'adapter'?"),
    ("chat judge", "is a reward model"),
    ("chat adapter --top-p 0", "top_p"),
    ("generate adapter", "--prompt TEXT"),
    ("generate adapter x", "--prompt TEXT"),
    ("generate adapter - --prompt x", "--prompt TEXT"),
    ("generate adapter --file nowhere.jsonl", "no such file"),
    ("generate adapter --prompt x --num 2 --temperature 0", "all the same"),
    ("generate judge --prompt x", "is a reward model"),
    ("eval adapter data.pth=x", "did you mean 'path'?"),
    ("eval adapter dta.path=x", "did you mean 'data.path'?"),
    ("eval adapter data=gsm9k", "did you mean 'gsm8k'?"),
    ("eval adapter data.path=nowhere.jsonl", "no such file"),
    ("eval adapter lr=1", "only its data"),
    ("eval adapter --reward-model adapter", "score head"),
    ("eval adapter --reward-model nope", "no such run"),
    ("eval judge --reward-model judge", "writes nothing"),
    ("eval adapter --against nope", "no such run"),
    ("eval whole --against base", "random weights"),
    ("export adapter .", "is already there"),
    ("export adapter new --dtype int8", "float32, bfloat16, float16"),
    ("export adapter new --push-to-hub it", "OWNER/NAME"),
    ("merge nowhere new", "adapter_config.json"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_ends_with_one_message(home, line, said, monkeypatch):
    monkeypatch.chdir(home)
    words = line.split()
    command = [*words] if words[0] in ("merge",) or "--home" in words else [*words, "--home", "."]
    out, error = run(*command, code=2)
    assert said in error and error.startswith("error: ") and "→" in error and not out
    assert not (home / "new").exists()


@pytest.mark.parametrize(
    "command", [*COMMANDS, *(f"sweep {c}" for c in ("status", "best", "rerun", "resume", "dashboard"))]
)
def test_every_help_has_an_example(command):
    out, _ = run(*command.split(), "--help")
    assert out.count("Example") == 1 and f"hydratune {command}" in " ".join(out.split())


def test_small_commands_and_errors_do_not_wait_for_torch(home):
    lines = [
        "--help", *(f"{c} --help" for c in COMMANDS), "runs lr<1 --home .", "runs --json --home .",
        "compare whole adapter --home .", "chat nope --home .", "chat judge --home .", "generate nope --prompt x --home .",
        "generate adapter --home .", "eval nope --home .", "eval adapter lr=1 --home .", "export nope x --home .",
    ]  # fmt: skip
    code = f"""
import sys
from hydratune.cli import app
for line in {lines!r}:
    try:
        app(line.split(), standalone_mode=True)
    except SystemExit:
        pass
    heavy = {{"torch", "transformers", "optuna", "wandb", "matplotlib"}} & {{*sys.modules}}
    assert not heavy, (line, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=home, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_shell_completes_commands():
    asked = {"_HYDRATUNE_COMPLETE": "complete_bash", "COMP_WORDS": "hydratune ru", "COMP_CWORD": "1"}
    done = subprocess.run([PROGRAM], capture_output=True, text=True, env={**os.environ, **asked}, timeout=60)
    assert done.stdout.split() == ["runs"]


def test_the_shell_completes_the_overrides_of_train():
    script = """
eval "$(python train.py -sc install=bash)"
COMP_WORDS=(python train.py peft=lora_) COMP_CWORD=2 COMP_LINE="python train.py peft=lora_" COMP_POINT=26
hydra_bash_completion
echo "${COMPREPLY[@]}"
"""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        env={**os.environ, "PATH": path},
    )
    assert done.stdout.split() == ["peft=lora_all"], done.stderr


def test_a_closed_pipe_is_no_error(home):
    with subprocess.Popen(
        [PROGRAM, "runs", "--json", "--home", home], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        started.stdout.close()
        assert "Traceback" not in started.stderr.read()
    assert started.returncode in (0, 1, -signal.SIGPIPE)
