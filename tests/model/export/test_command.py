"""The command on a trained run: other programs give its numbers, bad input leaves nothing."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.embedded import embedded_documents
from data.errors import InputError, run_cli
from data.tokenizer import Tokenizer, train_tokenizer
from eval.harness import local
from eval.harness.adapter import HarnessModel
from eval.models import load
from eval.perplexity import PerplexityConfig, evaluate
from model.execution import Execution
from model.export import __main__ as command
from model.export import register
from model.export.__main__ import ExportConfig, export
from tests.conftest import BIN, Runs, finish, free_port
from tests.model.export.checkpoints import bound, random_model, seal, write_checkpoint
from training import checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exports(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained run in every format."""
    folder = tmp_path_factory.mktemp("exports")
    for form in ("llama", "hf", "safetensors"):
        export(ExportConfig(str(trained), form, str(folder / form)))  # type: ignore[arg-type]
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("form", ["llama", "hf"])
@torch.no_grad()
def test_a_trained_run_has_its_logits_in_transformers(
    form: str, exports: dict[str, Path], trained: Path
):
    register()
    model = checkpoint.load_model(checkpoint.resolve(trained), CPU, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(exports[form])
    tokenizer = AutoTokenizer.from_pretrained(exports[form])
    ids = tokenizer("The module defines a class. " * 4, return_tensors="pt").input_ids[:, :64]
    ours = model(ids)
    assert float(ours.std()) > 0.1
    torch.testing.assert_close(theirs(ids).logits, ours, rtol=0, atol=bound(model, ours))


PROGRAM = """
import json, sys
assert not any("model.export" in name for name in sys.modules)
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, info = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("The module", return_tensors="pt")
made = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
equal = all(bool((a == b).all()) for a, b in zip(model.parameters(), again.parameters()))
print(json.dumps({"class": type(model).__module__, "made": made, "equal": equal,
                  "info": [len(one) for one in info.values()]}))
"""


def test_the_code_in_the_folder_needs_none_of_ours(
    exports: dict[str, Path], trained: Path, tmp_path: Path
):
    """In another process, another folder, without this repository on its path."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(exports["hf"]), str(tmp_path / "again")],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["class"].startswith("transformers_modules.")
    assert found["equal"]
    assert not any(found["info"])
    scorable = load(str(trained), CPU, torch.float32, Execution())[0]
    ids = scorable.tokenizer.encode_document("The module")
    ours = list(scorable.greedy(ids, 8))
    ends = [at for at, token in enumerate(ours) if token in (1, 2)]
    assert found["made"] == ids + (ours[: ends[0] + 1] if ends else ours)


def test_perplexity_is_that_of_the_checkpoint(
    exports: dict[str, Path], trained: Path, tmp_path: Path
):
    text = tmp_path / "text.txt"
    text.write_text("The module defines a class. It returns None.\n" * 30)
    settings: dict[str, Any] = {"data": [str(text)], "seq_len": 32}
    ours = evaluate(PerplexityConfig(str(trained), **settings))
    llama = evaluate(PerplexityConfig(f"hf:{exports['llama']}", **settings))
    factorised = evaluate(PerplexityConfig(f"hf:{exports['hf']}", **settings))  # by our own code
    files = evaluate(PerplexityConfig(str(exports["safetensors"]), **settings))
    assert llama["tokens"] == ours["tokens"] > 200
    # A mean of tokens whose logits differ by less than 1e-4.
    assert llama["loss_nats_per_token"] == pytest.approx(ours["loss_nats_per_token"], abs=1e-4)
    assert factorised["loss_nats_per_token"] == pytest.approx(ours["loss_nats_per_token"], abs=1e-4)
    assert files["loss_nats_per_token"] == ours["loss_nats_per_token"]


def test_an_export_is_scored_on_the_prepared_folder_of_its_run(
    exports: dict[str, Path], trained: Path, prepared: Path, tmp_path: Path
):
    """Its tokenizer.model says that the ids are its own; another one there says nothing."""
    settings: dict[str, Any] = {"data": [str(prepared)], "seq_len": 32, "max_tokens": 640}
    ours = evaluate(PerplexityConfig(str(trained), **settings))
    theirs = evaluate(PerplexityConfig(f"hf:{exports['llama']}", **settings))
    for key in ("loss_nats_per_token", "bits_per_byte"):
        assert theirs[key] == pytest.approx(ours[key], abs=1e-4)
    copy = tmp_path / "copy"
    shutil.copytree(exports["llama"], copy)
    documents = [text for _, (_, text) in zip(range(20), embedded_documents(), strict=False)]
    train_tokenizer(documents, copy / "tokenizer.model", 380, threads=1)
    with pytest.raises(InputError, match=r"its tokenizer .* is not the one that hf:"):
        evaluate(PerplexityConfig(f"hf:{copy}", **settings))


@pytest.mark.parametrize("form", ["llama", "hf"])
def test_lm_eval_gives_our_log_likelihoods(
    form: str, exports: dict[str, Path], trained: Path, tmp_path: Path
):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    (tmp_path / "sciq").mkdir()
    row = {"support": " It is hot.", "question": "How is it?", "correct_answer": "hot",
           "distractor1": "cold", "distractor2": "old", "distractor3": "far"}  # fmt: skip
    (tmp_path / "sciq" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    register()
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(exports[form]), device="cpu", dtype="float32", max_length=64),
        tasks=[local.load("sciq", tmp_path)],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    ours = HarnessModel(load(str(trained), CPU, torch.float32, Execution())[0], 4, 64, CPU)
    for sample in theirs["samples"]["sciq"]:
        arguments = sample["arguments"]
        pairs = [tuple(one.values() if isinstance(one, dict) else one) for one in arguments]
        requests = [SimpleNamespace(args=pair) for pair in pairs]
        mine = [nats for nats, _ in ours.loglikelihood(requests, disable_tqdm=True)]
        expected = [float(one[0][0]) for one in sample["resps"]]
        assert mine == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["llama", "hf"])
def test_lm_eval_sums_a_text_as_eval_perplexity_does(
    form: str, exports: dict[str, Path], trained: Path, tmp_path: Path
):
    """One document over several windows, from BOS on: log-likelihoods of all its tokens."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    text = "A text over several windows of the model, with classes and modules. " * 8
    register()
    options = {"device": "cpu", "dtype": "float32", "max_length": 32, "add_bos_token": False}
    theirs = HFLM(pretrained=str(exports[form]), **options)
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    [nats] = theirs.loglikelihood_rolling([request], disable_tqdm=True)
    (tmp_path / "text.txt").write_text(text)
    ours = evaluate(
        PerplexityConfig(str(trained), [str(tmp_path / "text.txt")], seq_len=32, per_document=True)
    )
    assert ours["tokens"] > 3 * 32
    assert ours["tokens"] % 32
    assert -nats / ours["tokens"] == pytest.approx(ours["loss_nats_per_token"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["llama", "hf"])
@pytest.mark.parametrize(("stage", "precision"), [(3, "fp32"), (2, "bf16"), (0, "bf16")])
@torch.no_grad()
def test_runs_of_two_ranks_are_exported(
    form: Any, stage: int, precision: str, runs: Runs, tmp_path: Path
):
    """Whatever ZeRO sharded and in whatever precision: the float32 master weights, whole."""
    config = runs.config(deepspeed__zero_stage=stage, training__precision=precision)
    launcher = [str(BIN / "torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}"]
    finish(runs.launch([*launcher, "train.py", "--config", str(config)]))
    run = runs.folder / "run"
    export(ExportConfig(str(run), form, str(tmp_path / "out")))
    register()
    model = checkpoint.load_model(checkpoint.resolve(run), CPU, torch.float32)
    ids = torch.randint(0, 390, (2, 48), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {value.dtype for value in theirs.state_dict().values()} == {torch.float32}
    ours = model(ids)
    torch.testing.assert_close(theirs(ids).logits, ours, rtol=0, atol=bound(model, ours))


@pytest.mark.parametrize("tied", [False, True])
def test_our_own_format_is_a_checkpoint(tied: bool, tokenizer_file: Path, tmp_path: Path):
    model = random_model(tie_embeddings=tied)
    state = {"began_from": "/some/where/checkpoints"}
    state |= {"init_from": {"path": "/some/where", "folder": "/some/where/else", "sha256": "ab"}}
    state |= {"converted": {"from": "/some/where", "method": "svd"}}
    source = write_checkpoint(model, tokenizer_file, tmp_path / "source", **state)
    out = tmp_path / "out"
    export(ExportConfig(str(source), "safetensors", str(out), precision="bf16"))
    files = {"model.safetensors", "model.json", "tokenizer.model", "checkpoint.json"}
    assert {path.name for path in out.iterdir()} == files | {"README.md"}
    found_state = checkpoint.read_state(out)
    assert "some/where" not in json.dumps(found_state), "a path of the machine"
    assert found_state["init_from"] == {"sha256": "ab"}
    assert found_state["converted"] == {"method": "svd"}
    assert checkpoint.load_tokenizer(out).sha256 == checkpoint.load_tokenizer(source).sha256
    weights = load_file(out / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in weights) is not tied
    found = checkpoint.load_model(out, CPU, torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value.bfloat16())


class Hostile:
    """Unpickling it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


@pytest.fixture
def source(tokenizer_file: Path, tmp_path: Path) -> Path:
    return write_checkpoint(random_model(), tokenizer_file, tmp_path / "source")


def ends(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the command."""
    codes: list[int] = []

    def leave(code: int) -> Any:
        codes.append(code)

    monkeypatch.setattr("sys.argv", ["export", *arguments])
    run_cli(command.main, leave)
    return codes[0]


@pytest.mark.parametrize("form", ["llama", "hf", "safetensors"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "model.json"])
@pytest.mark.parametrize("signed", [False, True])
def test_a_planted_pickle_is_never_loaded(
    form: str, name: str, signed: bool, source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    """signed: by somebody who also wrote the sums of checkpoint.json anew."""
    mark = tmp_path / "mark"
    (source / name).write_bytes(pickle.dumps(Hostile(mark)))
    if signed and name != "tokenizer.model":
        seal(source)
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(source), "--format", form, "--output", str(out)]
    assert ends(arguments, monkeypatch) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not mark.exists()
    assert not list(tmp_path.glob("*out*"))
    pickle.loads(pickle.dumps(Hostile(mark))).close()
    assert mark.exists(), "the pickle is harmless: the test shows nothing"


@pytest.mark.parametrize("form", ["llama", "hf", "safetensors"])
def test_pickles_beside_the_weights_stay_behind(form: Any, source: Path, tmp_path: Path):
    mark = tmp_path / "mark"
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "tokenizer.pkl"):
        (source / name).write_bytes(pickle.dumps(Hostile(mark)))
    export(ExportConfig(str(source), form, str(tmp_path / "out")))
    assert not mark.exists()
    for path in (tmp_path / "out").iterdir():
        assert path.suffix in (".json", ".safetensors", ".model", ".md", ".py")


def test_bad_input_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    out, there, file = tmp_path / "out", tmp_path / "there", tmp_path / "file"
    there.mkdir()
    file.write_text("mine")
    other = tmp_path / "other"
    write_checkpoint(random_model(qk_norm=True), source / "tokenizer.model", other)
    whole = ["--checkpoint", str(source), "--format", "llama", "--output"]
    cases = {
        "such folder": ["--checkpoint", "nowhere", "--format", "llama", "--output", str(out)],
        "no whole checkpoint": ["--checkpoint", str(there), "--format", "hf", "--output", str(out)],
        "qk_norm": ["--checkpoint", str(other), "--format", "llama", "--output", str(out)],
        "there: it exists": [*whole, str(there)],
        "file: it exists": [*whole, str(file)],
        "does not exist": [*whole, str(out / "deeper")],
        "llama or hf or safetensors": [*whole[:3], "gguf", "--output", str(out)],
        "fp32 or bf16": [*whole, str(out), "--precision", "fp8"],
    }
    before = sorted(path.name for path in tmp_path.iterdir())
    for expected, arguments in cases.items():
        assert ends(arguments, monkeypatch) == 2, expected
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not list(there.iterdir())
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "tokenizer.model"])
@pytest.mark.parametrize("how", ["missing", "short", "changed"])
def test_damaged_checkpoints_are_refused(name: str, how: str, source: Path, tmp_path: Path):
    content = (source / name).read_bytes()
    (source / name).unlink()
    if how == "short":
        (source / name).write_bytes(content[:-1])
    elif how == "changed":
        at = content.rindex(b"the") if name == "tokenizer.model" else len(content) - 5
        (source / name).write_bytes(content[:at] + b"0" + content[at + 1 :])
        if name == "tokenizer.model":
            Tokenizer(source / name)  # can still be read: the sums alone tell
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        export(ExportConfig(str(source), "llama", str(tmp_path / "out")))
    assert not list(tmp_path.glob("*out*"))


def test_a_failure_in_the_middle_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(command, "write_card", full)
    with pytest.raises(OSError, match="No space"):
        export(ExportConfig(str(source), "hf", str(tmp_path / "out")))
    assert not list(tmp_path.glob("*out*"))
