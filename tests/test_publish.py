"""Pushing to the Hub, over HTTP with the real client: models, cards, studies, refusals, and no secret."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import datasets
import finetune
import huggingface_hub
import pretrain
import pytest
import torch
from hub_server import Hub
from huggingface_hub import DatasetCard, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_noneuclid.experiments import publish, secrets
from hf_noneuclid.experiments.publishing.card import write_card
from hf_noneuclid.experiments.publishing.hub import Target
from hf_noneuclid.experiments.sweeping.execution import run_folder
from hf_noneuclid.experiments.sweeping.study import default_storage, open_study
from hf_noneuclid.experiments.sweeping.suite import Result, Suite
from hf_noneuclid.experiments.sweeping.trial_queue import TrialQueue

RECIPES = Path(__file__).parents[1] / "recipes"
TOKEN, GIVEN, READER = (
    "hf_aToken0123456789abcdef",
    "hf_theGivenOne0123456789abc",
    "hf_aReader0123456789abcdef",
)
OTHER_SECRET = "a-key-of-another-service"
TINY = [
    "--use_cpu=true",
    "--config_overrides=n_layer=1,n_embd=16,n_head=2",
    "--vocab_size=300",
    "--block_size=32",
    "--sample_tokens=0",
    "--logging_steps=1",
    "--max_steps=2",
    "--per_device_train_batch_size=4",
    "--eval_steps=0.999",
]

FINE_TUNED = [
    *("--task=causal_lm", "--use_cpu=true", "--max_steps=2", "--block_size=32", "--sample_tokens=0"),
    *("--logging_steps=1", "--per_device_train_batch_size=4", "--eval_blocks=4", "--max_train_rows=40"),
]


def environment(hub, home, **more):
    values = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **values,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **more,
    }


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{i} and the king of the land shall see light\n" for i in range(500)))
    return path


@pytest.fixture(scope="session")
def pushed(tmp_path_factory, text_file):
    """A run of pretrain.py that pushes, in a process of its own: the Hub, the folder, what it printed."""
    folder = tmp_path_factory.mktemp("pushed")
    hub = Hub({GIVEN: "me"})
    config = folder / "run.yaml"
    config.write_text(f"hub_token: {GIVEN}\nseed: 7\n")
    command = [sys.executable, RECIPES / "pretrain.py", *TINY, f"--train_files={text_file}"]
    command += ["--push_to_hub", "--hub_model_id=tiny", f"--hub_token={GIVEN}", f"--config={config}"]
    command += ["--hub_license=mit", "--data_license=cc0-1.0"]
    variables = environment(hub, folder / "home", HF_TOKEN=TOKEN, OTHER_API_KEY=OTHER_SECRET)
    done = subprocess.run(
        [*map(str, command), "--output_dir=out"], cwd=folder, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    yield hub, folder / "out", done.stdout + done.stderr
    hub.stop()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub for this process; `me` is logged in."""
    hub = Hub({TOKEN: "me", READER: "me", "hf_theirs0123456789abcdef": "them"}, readers=[READER])
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix("https://huggingface.co")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once, for an earlier test's Hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.stop()


@pytest.fixture
def run(pushed, tmp_path):
    """The folder of a finished run that nobody has pushed yet."""
    folder = tmp_path / "run"
    return shutil.copytree(pushed[1], folder)


def based_on(name, on_hub=True, **values):
    """A base model as metrics.json describes it."""
    return {"name": name, "on_hub": on_hub, "revision": None, "package": None, "gguf_file": None, **values}


def refused(capsys, main, *flags, code=2):
    with pytest.raises(SystemExit) as caught:
        main([*map(str, flags)])
    assert caught.value.code == code
    return capsys.readouterr().err


def refused_training(capsys, tmp_path, *flags):
    """What a run says that must not begin: before any text is read, and without an output folder."""
    folder = tmp_path / "out"
    flags = [*TINY, "--push_to_hub", f"--output_dir={folder}", "--train_files=nowhere.txt", *flags]
    message = refused(capsys, pretrain.main, *flags)
    assert not folder.exists()
    assert "nowhere.txt" not in message
    return message


def fine_tune(out, text_file, *flags):
    """Fine-tune a language model in this process, and push it as its folder is called."""
    flags = [*FINE_TUNED, f"--train_files={text_file}", *flags]
    finetune.main([*flags, "--push_to_hub", f"--output_dir={out}"])


# ---------------------------------------------------------------- a model


def test_the_pushed_model_is_the_trained_one(pushed, tmp_path):
    hub, folder, _ = pushed
    code = (
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokens = AutoTokenizer.from_pretrained('me/tiny')('and the king', return_tensors='pt')\n"
        "model = AutoModelForCausalLM.from_pretrained('me/tiny')\n"
        "torch.save(model(tokens['input_ids']).logits.detach(), 'logits.pt')\n"
    )
    variables = environment(hub, tmp_path / "empty")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, check=True, capture_output=True)
    tokens = AutoTokenizer.from_pretrained(folder)("and the king", return_tensors="pt")
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens["input_ids"]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_a_pushed_model_is_fine_tuned_and_its_adapter_pushed_in_turn(pushed, text_file, tmp_path):
    hub, *_ = pushed
    command = [sys.executable, RECIPES / "finetune.py", "--task=causal_lm", "--model_name_or_path=me/tiny"]
    command += ["--use_cpu=true", "--lora_rank=2", f"--train_files={text_file}", "--block_size=32"]
    command += ["--max_steps=2", "--sample_tokens=0", "--optim=muonmax_momo", "--output_dir=out"]
    command += ["--push_to_hub", "--hub_model_id=tiny-lora"]
    variables = environment(hub, tmp_path / "home", HF_TOKEN=GIVEN)
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    card = ModelCard(hub.files("models/me/tiny-lora")["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == ("me/tiny", "peft")
    row = " | ".join(f"{metrics[moment]['loss']:.6g}" for moment in ("before", "after"))
    assert f"| result | before | after |\n|---|---|---|\n| eval_loss | {row} |" in card.text
    load = card.text.partition("```python\n")[2].partition("```")[0]
    code = f"{load}\nmodel(**tokenizer('and the king', return_tensors='pt'))"
    variables = environment(hub, tmp_path / "empty")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, check=True, capture_output=True)


def test_a_merged_model_replaces_the_adapters_of_its_checkpoints(hub, pushed, text_file, tmp_path):
    out = tmp_path / "merged"
    hub.add("models/me/tiny", pushed[0].files("models/me/tiny"))
    flags = ["--model_name_or_path=me/tiny", "--lora_rank=2", "--lora_merge=true"]
    fine_tune(out, text_file, *flags, "--hub_always_push=true")
    assert hub.repos["models/me/merged"].commits[0].startswith("Training in progress")
    files = hub.files("models/me/merged")
    assert not any(name.startswith("adapter_") for name in files)
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()


def test_checkpoints_are_pushed_while_training_and_the_results_at_the_end(pushed):
    hub, _, output = pushed
    commits = hub.repos["models/me/tiny"].commits
    assert commits[0].startswith("Training in progress, step")
    assert commits[-1] == "Push the model and its results"
    assert "Model save" not in commits
    assert not any(name.startswith("checkpoint-") for name in hub.files("models/me/tiny"))
    assert "Pushing" in output
    assert f"Pushed: {hub.url}" in output


def test_the_card_says_what_was_done(pushed):
    hub, folder, _ = pushed
    files = hub.files("models/me/tiny")
    metrics = json.loads((folder / "metrics.json").read_text())
    card = ModelCard(files["README.md"].decode())
    assert files["curves.png"].startswith(b"\x89PNG")
    for words in (
        "# tiny\n",
        f"\n{metrics['limited_steps'] or 'No'} ",
        " limited by the learning rate.\n",
        "](curves.png)",
        metrics["corpus"]["train_sha256"],
        metrics["versions"]["torch"],
        metrics["hardware"]["cpu"],
        "cc0-1.0",
        "`product_norm` | hybrid",
        "`nuclear_norm` | exact",
        "`step_size` | momo+slope",
        "`first_step` | 1e-05",
        "`loss_lower_bound` | 0.0",
        'AutoModelForCausalLM.from_pretrained("me/tiny")',
        "import hf_noneuclid",
        "2510.09827",
        "2305.07583",
        "python recipes/pretrain.py --use_cpu=true",
        "seed: 7",
    ):
        assert words in card.text, words
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {name: metrics[key] for name, key in (("loss", "eval_loss"),)} | {
        name: metrics[name] for name in ("perplexity", "bits_per_byte")
    }


def test_the_card_of_a_fine_tuned_local_model_names_it_without_its_folder(
    hub, pushed, text_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pushed[1], tmp_path / "outputs" / "pretrain")
    fine_tune(tmp_path / "tuned", text_file)  # with the model that is the default
    base = json.loads((tmp_path / "tuned" / "metrics.json").read_text())["base_model"]
    assert (base["name"], base["on_hub"]) == ("outputs/pretrain", False)
    card = ModelCard(hub.files("models/me/tuned")["README.md"].decode())
    assert "fine-tuned from the local model `pretrain` with" in card.text
    assert card.data.base_model is None


@pytest.mark.parametrize(
    ("base", "words", "name"),
    [
        (None, "trained from scratch", None),
        (based_on("me/base", revision="main"), "fine-tuned from `me/base` with", "me/base"),
        (
            based_on("me/base", revision="v1", gguf_file="a.gguf"),
            "fine-tuned from `me/base` at revision `v1` (`a.gguf`)",
            "me/base",
        ),
        (
            based_on("a_package", on_hub=False, package="a_package", gguf_file="a.gguf"),
            "fine-tuned from the model in the Python package `a_package` (`a.gguf`)",
            None,
        ),
    ],
)
def test_the_card_says_what_the_training_started_from(run, base, words, name):
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "base_model": base}))
    write_card(run, Target("me/run"))
    card = ModelCard.load(run / "README.md")
    assert words in card.text
    assert card.data.base_model == name


def test_no_secret_is_written_printed_or_uploaded(pushed):
    hub, folder, output = pushed
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    sent = {head: body for head, body in hub.received}
    kept = hub.files("models/me/tiny")
    encoded = {name: content for name, content in kept.items()}
    for secret in (TOKEN, GIVEN, OTHER_SECRET):
        assert secret not in output
        for place in (written, sent, encoded):
            assert [name for name, content in place.items() if secret.encode() in content] == []
    assert any(path.name == "training_args.bin" and "checkpoint-" in str(path) for path in written)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert not any("hub_token" in argument for argument in metrics["command"])
    assert metrics["config"]["hub_token"] == "***"


def test_training_args_can_be_read_with_the_package(pushed):
    args = torch.load(pushed[1] / "training_args.bin", weights_only=False)
    assert args.optim == "muonmax_momo"
    assert args.hub_token is None


@pytest.mark.parametrize(("dies_at", "answered"), [("PUT /lfs/", 1), ("/commit/", 0)])
def test_an_interrupted_push_is_finished_by_the_command_it_names(
    hub, run, capsys, monkeypatch, dies_at, answered
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    hub.dies_at, hub.dies_after = dies_at, answered
    flags = ["--folder", run, "--hub_model_id", "tiny", "--hub_revision", "v1"]
    message = refused(capsys, publish.main, *flags, code=4)
    assert str(run) in message
    assert "Push later with" in message
    assert hub.files("models/me/tiny", "v1").keys() == {".gitattributes"}
    assert hub.objects

    hub.start()
    noneuclid, command, *arguments = shlex.split(message.splitlines()[-1])
    assert (noneuclid, command) == ("noneuclid", "publish")
    publish.main(arguments)
    model = hub.files("models/me/tiny", "v1")["model.safetensors"]
    assert model == (run / "model.safetensors").read_bytes()
    sent = hub.requests("PUT /lfs/")
    assert len(set(sent)) == len(sent)  # what had arrived is not sent again
    assert (
        'from_pretrained("me/tiny", revision="v1")' in hub.files("models/me/tiny", "v1")["README.md"].decode()
    )


def test_a_training_whose_push_fails_keeps_its_results(hub, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.dies_at = "/commit/"  # of the first checkpoint
    flags = [*TINY, f"--train_files={text_file}", "--push_to_hub", f"--output_dir={tmp_path / 'out'}"]
    message = refused(capsys, pretrain.main, *flags, code=4)
    assert "Push later with" in message
    assert f"--folder {tmp_path / 'out'} --hub_model_id me/out" in message
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 2


def test_a_run_that_diverges_ends_well_and_is_not_pushed(hub, text_file, tmp_path, capsys):
    flags = ["--push_to_hub", "--hub_strategy=end", "--optim=sgd", "--learning_rate=1e30"]
    pretrain.main([*TINY, *flags, f"--train_files={text_file}", f"--output_dir={tmp_path / 'out'}"])
    assert "diverged, so its model is not pushed" in capsys.readouterr().err
    assert hub.files("models/me/out").keys() == {".gitattributes"}


def test_no_checkpoint_is_pushed_after_the_loss_was_nan(hub, text_file, tmp_path, capsys):
    flags = ["--push_to_hub", "--hub_always_push=true", "--optim=sgd", "--learning_rate=1e30"]
    flags += ["--max_steps=3", "--save_steps=1", f"--output_dir={tmp_path / 'out'}"]
    pretrain.main([*TINY, *flags, f"--train_files={text_file}"])
    assert hub.repos["models/me/out"].commits == ["Training in progress, step 1"]
    assert "diverged, so its model is not pushed" in capsys.readouterr().err


def test_pushing_again_changes_nothing_and_another_run_is_refused(hub, run, tmp_path, capsys):
    flags = ["--folder", run, "--hub_model_id", "me/tiny"]
    publish.main([*map(str, flags)])
    before = dict(hub.files("models/me/tiny"))
    publish.main([*map(str, flags)])
    assert hub.files("models/me/tiny") == before
    assert len(hub.repos["models/me/tiny"].commits) == 1

    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(other / "checkpoint-2")
    (other / "model.safetensors").write_bytes(b"other weights")
    flags = ["--folder", other, "--hub_model_id", "me/tiny"]
    assert "--overwrite_hub_model" in refused(capsys, publish.main, *flags)
    assert hub.files("models/me/tiny") == before
    (other / "checkpoint-2").mkdir()
    shutil.copy(run / "model.safetensors", other / "checkpoint-2")  # as if the run had gone on from there
    publish.main([*map(str, flags)])
    assert hub.files("models/me/tiny")["model.safetensors"] == b"other weights"

    shutil.rmtree(other / "checkpoint-2")
    hub.add("models/me/tiny", {"model.safetensors": b"a", "pytorch_model.bin": b"of another model"})
    assert "--overwrite_hub_model" in refused(capsys, publish.main, *flags)
    publish.main([*map(str, flags), "--overwrite_hub_model"])
    after = hub.files("models/me/tiny")
    assert after["model.safetensors"] == b"other weights"
    assert "pytorch_model.bin" not in after


def test_a_branch_that_is_made_holds_nothing_of_the_model_on_main(hub, run):
    other = {"adapter_config.json": b"{}", "pytorch_model.bin": b"of another model", "README.md": b"its card"}
    hub.add("models/me/other", other)
    publish.main([*map(str, ["--folder", run, "--hub_model_id", "me/other", "--hub_revision", "v2"])])
    made = hub.files("models/me/other", "v2")
    assert "model.safetensors" in made
    assert not {"adapter_config.json", "pytorch_model.bin"} & made.keys()
    assert hub.files("models/me/other") == {".gitattributes": b"", **other}
    commits = len(hub.repos["models/me/other"].commits)
    publish.main([*map(str, ["--folder", run, "--hub_model_id", "me/other", "--hub_revision", "v2"])])
    assert hub.files("models/me/other", "v2") == made
    assert len(hub.repos["models/me/other"].commits) == commits


def test_checkpoints_and_files_of_the_machine_are_not_pushed(hub, run):
    left_out = {"checkpoint-9/model.safetensors", "_private.txt", ".cache/a", "run.json"}
    pushed = {"notes[1].txt", "logs/checkpoint-9.txt"}
    for name in left_out | pushed:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("text")
    publish.main(["--folder", str(run)])
    assert pushed <= hub.files("models/me/run").keys()
    assert not left_out & hub.files("models/me/run").keys()


def test_folders_that_cannot_be_pushed(hub, run, tmp_path, capsys):
    assert "no finished run" in refused(capsys, publish.main, "--folder", tmp_path / "nowhere")
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "diverged": True}))
    assert "the run diverged" in refused(capsys, publish.main, "--folder", run)
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "model.safetensors").unlink()
    assert "holds no model" in refused(capsys, publish.main, "--folder", run)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / name).write_text("{}")
    (run / "metrics.json").write_text(
        json.dumps({**metrics, "base_model": based_on(str(tmp_path), on_hub=False)})
    )
    assert "whose base model is not on the Hub" in refused(capsys, publish.main, "--folder", run)
    assert not hub.repos


# ---------------------------------------------------------------- a study

LOSSES = {
    ("muon", 0.01): 5.5,
    ("muon", 0.1): 5.0,
    ("adamw_torch", 0.01): 5.25,
    ("adamw_torch", 0.1): math.inf,
}


def copied_outcome(pattern, folder, run, loss):
    """Leaves in a folder what a run with this loss would have left: another run's files, changed a little."""
    diverged = math.isinf(loss)
    known = json.loads((pattern / "metrics.json").read_text())
    metrics = {**known, "eval_loss": None if diverged else loss, "diverged": diverged}
    metrics["command"] = [f"--optim={run.method}", f"--learning_rate={run.learning_rate}"]
    shutil.copytree(pattern, folder, ignore=shutil.ignore_patterns("checkpoint*"))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    history = json.loads((pattern / "history.json").read_text())
    state = "diverged" if diverged else "done"
    return Result(run, state, metrics["eval_loss"], None, 1.0, metrics, history)


@pytest.fixture
def study(pushed, tmp_path):
    """A finished study of two methods at two learning rates, whose models are all copies of one."""
    folder = tmp_path / "tiny_study"
    rates = {"learning_rate": [0.01, 0.1], "method_options": {}, "options": {}}
    suite = Suite(
        name="tiny",
        about="A comparison for the tests.",
        recipe="pretrain",
        options={"max_steps": 2, "train_files": ["words.txt"]},
        grid=[{"method": ["muon", "adamw_torch"], **rates}],
        per_method={},
        seeds=[0],
        more_seeds={"seeds": [], "within_decades": 0.0},
        report={"paper": {"muon": {"mean": 5.0, "std": 0.1}}},
        launch={"processes": 1, "accelerate_config": None, "threads": 1},
    )
    opened = open_study(default_storage(folder), suite.name, suite=suite)
    opened.set_user_attr("id", "abc")
    opened.set_user_attr("suite", asdict(suite))
    queue = TrialQueue(opened, suite)

    def execute(run, stop, slot):
        return copied_outcome(pushed[1], run_folder(folder, run), run, LOSSES[run.method, run.learning_rate])

    while queue.refill():
        queue.attempt(execute, threading.Event(), 0)
    return folder


def test_the_best_checkpoint_of_each_method_and_all_runs_are_published(hub, study):
    publish.main(["--study", str(study), "--namespace", "me", "--hub_private_repo", "true"])
    assert hub.repos.keys() == {"models/me/tiny-muon", "models/me/tiny-adamw_torch", "datasets/me/tiny-runs"}
    assert all(repo.private for repo in hub.repos.values())
    model = ModelCard(hub.files("models/me/tiny-muon")["README.md"].decode())
    assert "learning rate 0.1, seed 0, final loss 5.0000" in model.text
    assert "**not run**" in model.text  # one seed is no verdict beside the paper
    assert f"{hub.url}/datasets/me/tiny-runs" in model.text
    assert f"{hub.url}/me/tiny-adamw_torch" in model.text
    assert {result.metric_type: result.metric_value for result in model.data.eval_results}["loss"] == 5.0
    assert "model.safetensors" in hub.files("models/me/tiny-adamw_torch")


def test_the_card_of_the_runs_leads_to_the_models_and_says_the_verdict(hub, study):
    publish.main(["--study", str(study), "--namespace", "me"])
    files = hub.files("datasets/me/tiny-runs")
    card = DatasetCard(files["README.md"].decode())
    assert "**not run**" in card.text
    assert "](report/final_loss.png)" in card.text
    assert "report/final_loss.png" in files
    assert f"{hub.url}/me/tiny-muon" in card.text
    assert f"{hub.url}/me/tiny-adamw_torch" in card.text
    assert {config["data_files"] for config in card.data.configs} <= files.keys()
    names = [json.loads(line)["run"] for line in files["runs.jsonl"].splitlines()]
    assert len(set(names)) == len(LOSSES)


def test_the_published_runs_load_as_a_dataset(hub, study, tmp_path):
    publish.main(["--study", str(study), "--namespace", "me"])
    options = {"cache_dir": str(tmp_path / "cache"), "split": "train"}
    runs = datasets.load_dataset(str(study / "hub"), "runs", **options)
    losses = [math.inf if loss is None else loss for loss in runs["loss"]]
    assert dict(zip(zip(runs["method"], runs["learning_rate"], strict=True), losses, strict=True)) == LOSSES
    history = datasets.load_dataset(str(study / "hub"), "history", **options)
    assert set(history["run"]) == set(runs["run"])


def test_a_study_goes_on_where_its_push_was_interrupted(hub, study, capsys):
    hub.dies_at = "datasets/me/tiny-runs/commit/"
    message = refused(capsys, publish.main, "--study", study, "--namespace", "me", code=4)
    before = {name: list(repo.commits) for name, repo in hub.repos.items()}
    assert before["datasets/me/tiny-runs"] == []
    hub.start()
    publish.main(shlex.split(message.splitlines()[-1])[2:])  # without `noneuclid publish`
    after = {name: repo.commits for name, repo in hub.repos.items()}
    assert after == {**before, "datasets/me/tiny-runs": ["Push all runs"]}


def test_a_dataset_that_holds_something_else_is_refused(hub, study, capsys):
    hub.add("datasets/me/tiny-runs", {"train.csv": b"1,2"})
    flags = ["--study", str(study), "--namespace", "me"]
    assert "me/tiny-runs holds something else already (train.csv" in refused(capsys, publish.main, *flags)
    assert not any(repo.commits for repo in hub.repos.values())
    publish.main([*flags, "--overwrite_hub_model"])
    assert "train.csv" not in hub.files("datasets/me/tiny-runs")
    publish.main(flags)  # a study may be pushed again


def test_a_study_without_its_models_says_how_to_make_them(hub, study, capsys):
    for path in study.rglob("model.safetensors"):
        path.unlink()
    message = refused(capsys, publish.main, "--study", study, "--namespace", "me")
    assert "--keep_models" in message
    commands = [line for line in message.splitlines() if line.startswith("  python")]
    assert len(commands) == 2
    assert "--optim=muon" in commands[0]
    assert "--learning_rate=0.1" in commands[0]
    assert not hub.repos


# ---------------------------------------------------------------- refusals before training


def test_a_run_without_a_token_does_not_begin(hub, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused_training(capsys, tmp_path)
    assert not hub.received


def test_a_token_that_is_not_accepted_or_may_only_read(hub, capsys, tmp_path, monkeypatch):
    unknown = "hf_nobodys0123456789abcdef"
    monkeypatch.setenv("HF_TOKEN", unknown)
    message = refused_training(capsys, tmp_path)
    assert "cannot push to out" in message
    assert "Invalid username or password" in message
    assert "hf auth login" in message
    assert unknown not in message
    monkeypatch.setenv("HF_TOKEN", READER)
    message = refused_training(capsys, tmp_path)
    assert "you don't have the right to write here" in message
    assert "your token may write there" in message


def test_a_repository_of_somebody_else_is_refused(hub, capsys, tmp_path):
    hub.add("models/them/theirs", {})
    for name in ("them/new", "them/theirs", "a//b"):
        message = refused_training(capsys, tmp_path, f"--hub_model_id={name}")
        assert f"cannot push to {name}" in message
        assert "Check --hub_model_id" in message
    assert list(hub.repos) == ["models/them/theirs"]


def test_a_run_goes_on_in_the_repository_that_it_has_pushed_to(hub, pushed, capsys, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pushed[1], out)
    hub.add("models/me/out", pushed[0].files("models/me/tiny"))
    flags = [*TINY, "--max_steps=4", "--push_to_hub", f"--output_dir={out}", "--train_files=nowhere.txt"]
    assert "nowhere.txt" in refused(capsys, pretrain.main, *flags, "--resume_from_checkpoint=true")
    message = refused(capsys, pretrain.main, *flags, "--overwrite_output_dir")
    assert "me/out holds something else" in message


def test_a_repository_with_another_model_is_refused(hub, capsys, tmp_path):
    hub.add("models/me/out", {"config.json": b"{}", "model.safetensors": b"weights"})
    message = refused_training(capsys, tmp_path)
    assert "me/out holds something else" in message
    assert "--overwrite_hub_model" in message


def test_an_adapter_of_a_model_that_is_not_on_the_hub_is_refused(hub, pushed, text_file, tmp_path, capsys):
    flags = ["--lora_rank=2", f"--model_name_or_path={pushed[1]}"]
    with pytest.raises(SystemExit, match="2"):
        fine_tune(tmp_path / "out", "nowhere.txt", *flags)
    message = capsys.readouterr().err
    assert "--lora_merge true" in message
    assert "nowhere.txt" not in message
    assert not hub.repos
    flags += ["--lora_merge=true", "--hub_always_push=true"]
    fine_tune(tmp_path / "out", text_file, *flags)
    assert hub.repos["models/me/out"].commits == ["Push the model and its results"]
    assert not any(name.startswith("adapter_") for name in hub.files("models/me/out"))


def test_a_public_repository_is_refused_where_a_private_one_was_asked_for(hub, run, capsys, tmp_path):
    hub.add("models/me/out", {"README.md": b"to come"})
    message = refused_training(capsys, tmp_path, "--hub_private_repo=true")
    assert "me/out is public" in message
    publish.main([*map(str, ["--folder", run, "--hub_model_id", "me/out"])])
    flags = ["--folder", run, "--hub_model_id", "me/mine", "--hub_private_repo", "true"]
    publish.main([*map(str, flags)])
    publish.main([*map(str, flags)])  # what it has made is private
    assert hub.repos["models/me/mine"].private


def test_a_hub_that_cannot_be_reached(hub, capsys, tmp_path):
    hub.stop()
    message = refused_training(capsys, tmp_path)
    assert f"cannot push to out at {hub.url}: ConnectError" in message
    assert "noneuclid publish" in message


# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--hub_token", "abc", "--seed=1"], ["--seed=1"]),
        (["--hub_token=abc", "--bf16"], ["--bf16"]),
        (["--bf16", "--push_to_hub_token", "abc"], ["--bf16"]),
        (
            ["--tokenizer_name", "gpt2", "--sample_tokens=3", "--eos_token=</s>"],
            ["--tokenizer_name", "gpt2", "--sample_tokens=3", "--eos_token=</s>"],
        ),
        (["--train_files", f"of/{GIVEN}/a.txt"], ["--train_files", "of/***/a.txt"]),
        (["--storage=postgresql://me:p@ss/w0rd@db/optuna"], ["--storage=postgresql://me:***@db/optuna"]),
        (
            ["--storage", "mysql://db/x?user=me&password=pw&b=1"],
            ["--storage", "mysql://db/x?user=me&password=***&b=1"],
        ),
        (["--storage=http://db:80/me?x=1"], ["--storage=http://db:80/me?x=1"]),
    ],
)
def test_a_command_line_is_shown_without_secrets(given, shown):
    assert secrets.redact_arguments(given) == shown


def test_a_password_in_the_storage_is_not_shown_when_a_study_is_not_pushed(hub, study, capsys, monkeypatch):
    opened = open_study(default_storage(study))
    monkeypatch.setattr("hf_noneuclid.experiments.publishing.study.open_study", lambda storage, name: opened)
    hub.dies_at = "/commit/"
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    storage = "postgresql://me:hunter2secretpw@db/optuna"
    flags = ["--study", study, "--namespace", "me", "--storage", storage]
    message = refused(capsys, publish.main, *flags, code=4)
    assert "postgresql://me:***@db/optuna" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("flag", ["--hub_tokn={}", "--hub_tok={}", "--hub_tokn {}"])
def test_a_token_under_a_mistyped_option_is_not_shown(flag, capsys):
    message = refused(capsys, publish.main, "--folder", "out", *flag.format(GIVEN).split())
    assert "unrecognized arguments: --hub_to" in message
    assert GIVEN not in message


def test_texts_are_scrubbed_of_what_the_environment_holds(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", OTHER_SECRET)
    value = {"a": [f"key {OTHER_SECRET}", 1], "hub_token": "x", "tokens": 5}
    assert secrets.scrub(value) == {"a": ["key ***", 1], "hub_token": "***", "tokens": 5}
