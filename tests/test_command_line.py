"""What a command line refuses, in one line that helps, and what overrules what."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.command_line import parse_options
from data.errors import InputError
from model import Ranks
from training.config import CONFIG_FOLDER, RunConfig


def parse(*argv: object, folder: Path | None = CONFIG_FOLDER) -> RunConfig:
    return parse_options(
        RunConfig, [str(a) for a in argv], prog="train.py", description="", config_folder=folder
    )[0]


def refusal(*argv: object) -> str:
    """The message of a command line that must be refused."""
    with pytest.raises(InputError) as error:
        parse(*argv)
    message = str(error.value)
    assert message.strip()
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """A small run's YAML with dotted changes: a value, or ABSENT to leave the key out."""

    def write(changes: dict[str, Any] | None = None, text: str | bytes | None = None) -> Path:
        path = tmp_path / "run.yaml"
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            return path
        config: dict[str, Any] = {
            "model": {
                "vocab_size": 100,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_layers": 2,
                "num_heads": 2,
                "max_seq_len": 32,
                "r": 4,
            },
            "training": {
                "run_dir": "runs/x",
                "max_steps": 10,
                "global_batch_size": 4,
                "seq_len": 8,
                "learning_rate": 0.01,
            },
        }
        for key, value in (changes or {}).items():
            *blocks, leaf = key.split(".")
            target = config
            for block in blocks:
                target = target.setdefault(block, {})
            if value is ABSENT:
                del target[leaf]
            else:
                target[leaf] = value
        path.write_text(yaml.safe_dump(config))
        return path

    return write


ABSENT = object()
UNKNOWN = [
    ("model.hiden_size", "model.hidden_size"),
    ("model.n_layers", "model.num_layers"),
    ("model.num_head", "model.num_heads"),
    ("model.tie_embedding", "model.tie_embeddings"),
    ("training.lr", "training.learning_rate"),
    ("training.learning_rat", "training.learning_rate"),
    ("training.seq_length", "training.seq_len"),
    ("training.grad_clipping", "training.gradient_clipping"),
    ("training.warmup", "training.warmup_steps"),
    ("data.pth", "data.path"),
    ("deepspeed.stage", "deepspeed.zero_stage"),
]


@pytest.mark.parametrize(("key", "nearest"), UNKNOWN)
def test_an_unknown_key_of_the_yaml_names_the_nearest(key, nearest, written):
    path = written({key: 3})
    message = refusal("--config", path)
    assert str(path) in message
    assert re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", message)
    assert re.search(rf"did you mean {re.escape(nearest)}(?![\w.])", message)


@pytest.mark.parametrize(("key", "nearest"), UNKNOWN)
@pytest.mark.parametrize("form", ["--{} 3", "--{}=3"])
def test_an_unknown_option_names_the_nearest(form, key, nearest, written):
    message = refusal("--config", written(), *form.format(key).split())
    assert f"--{key}" in message
    assert re.search(rf"did you mean (--)?{re.escape(nearest)}(?![\w.])", message)


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("--hidden_size", "model.hidden_size"), ("--max_steps", "training.max_steps")],
)
def test_an_option_without_its_block_names_it(option, nearest, written):
    assert nearest in refusal("--config", written(), option, "3")


def test_a_key_in_the_wrong_block_names_the_right_one(written):
    assert "training.learning_rate" in refusal("--config", written({"learning_rate": 3}))
    assert "training.learning_rate" in refusal("--config", written({"model.learning_rate": 3}))
    assert "training" in refusal("--config", written({"trainig": {"seed": 1}}))


def test_an_unknown_rank_names_the_nearest(written):
    """Of {q, k, v, o, ffn}, in the YAML and as options."""
    assert "model.r.ffn" in refusal("--config", written({"model.r": {"q": 1, "fn": 2}}))
    assert "model.r.ffn" in refusal("--config", written(), "--model.r", "{q: 1, fn: 2}")
    assert "model.r.ffn" in refusal("--config", written(), "--model.r.fn", "2")


def test_what_resembles_nothing_gets_no_suggestion(written):
    for message in (
        refusal("--config", written(), "--zzzz", "3"),
        refusal("--config", written({"zzzz": 3})),
        refusal("--config", written({"model.zzzz": 3})),
    ):
        assert "zzzz" in message
        assert "did you mean" not in message


def test_an_argument_that_is_no_option_is_named(written):
    assert "stray" in refusal("--config", written(), "stray")


@pytest.mark.parametrize("option", ["--model.hid", "--training.min", "--conf"])
def test_options_are_not_abbreviated(option, written):
    """An abbreviation that works today means something else when a field is added."""
    if option == "--conf":
        assert option in refusal(option, written())
    else:
        assert option in refusal("--config", written(), option, "0")


WRONG = [
    ("model.hidden_size", "wide"),
    ("model.hidden_size", 16.5),
    ("model.hidden_size", True),
    ("model.tie_embeddings", 3),
    ("model.dropout", "much"),
    ("model.family", "llama3"),
    ("model.init", "xavier"),
    ("model.r", "low"),
    ("model.r", 2.5),
    ("training.learning_rate", "fast"),
    ("training.max_steps", 1.5),
    ("training.schedule", "cosin"),
    ("training.precision", "fp16"),
    ("training.run_dir", 3),
    ("deepspeed.zero_stage", 4),
    ("data.verify", "perhaps"),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_wrong_type_or_name_in_the_yaml_names_the_key(key, value, written):
    message = refusal("--config", written({key: value}))
    assert key in message
    assert str(value) in message


@pytest.mark.parametrize(("key", "value"), [c for c in WRONG if c != ("training.run_dir", 3)])
def test_a_wrong_type_or_name_of_an_option_names_the_key(key, value, written):
    assert key in refusal("--config", written(), f"--{key}", value)


@pytest.mark.parametrize("value", ["low", 2.5, True, [4], {"q": "low"}])
def test_the_refusal_of_a_rank_says_what_is_allowed(value, written):
    """In words, not in the names of Python classes."""
    message = refusal("--config", written({"model.r": value}))
    assert "model.r" in message
    assert "<class" not in message
    assert "class_path" not in message


@pytest.mark.parametrize("block", ["model", "training", "data", "deepspeed"])
@pytest.mark.parametrize("value", [3, [3], "text"])
def test_a_block_is_a_mapping(block, value, written):
    message = refusal("--config", written({block: value}))
    assert re.search(rf"\b{block}\b", message)
    assert "required" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.num_heads", 3),
        ("model.r", 17),
        ("model.dropout", 1.5),
        ("training.seq_len", 64),
        ("training.max_steps", 0),
        ("training.seed", -1),
        ("training.min_learning_rate", 1.0),
        ("training.learning_rate", 0.0),
        ("training.learning_rate", float("nan")),
        ("training.learning_rate", float("inf")),
        ("training.beta2", 1.0),
        ("training.eps", float("inf")),
        ("training.weight_decay", float("inf")),
        ("training.weight_decay", -0.1),
        ("training.keep_checkpoints", 0),
    ],
)
def test_a_wrong_value_names_the_key_and_what_was_found(key, value, written):
    path = written({key: value})
    for message in (refusal("--config", path), refusal("--config", written(), f"--{key}", value)):
        assert key in message
        assert str(value) in message


def test_offload_needs_a_sharded_optimizer(written):
    options = ("--deepspeed.zero_stage", "0", "--deepspeed.offload_optimizer", "cpu")
    assert "deepspeed.offload_optimizer" in refusal("--config", written(), *options)


@pytest.mark.parametrize("key", ["model.hidden_size", "training.run_dir", "training.max_steps"])
@pytest.mark.parametrize("value", [ABSENT, None])
def test_a_missing_required_key_is_named(key, value, written):
    assert key in refusal("--config", written({key: value}))


def test_without_a_config_the_required_keys_are_named():
    message = refusal()
    for key in ("model.hidden_size", "training.max_steps"):
        assert key in message


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
@pytest.mark.parametrize("name", ["absent.yaml", "absent", "no/such/folder/run.yaml"])
def test_a_missing_file_is_named(name, form):
    message = refusal(*form.format(name).split())
    assert name in message
    assert "no such file" in message.lower()


def test_a_folder_is_no_config(tmp_path):
    assert str(tmp_path) in refusal("--config", tmp_path)


def test_config_needs_a_value():
    assert "--config" in refusal("--config")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [1\n  x: {", "not valid YAML"),
        ("model:\n\thidden_size: 3\n", "not valid YAML"),
        ("a: b: c\n", "not valid YAML"),
        ("- 1\n- 2\n", "list"),
        ("hello\n", "str"),
        ("3\n", "int"),
        ("", "mapping"),
        ("# only a comment\n", "mapping"),
        ("modèle: 1\n".encode("latin-1"), "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        ("? [1]\n: 2\n", "not valid YAML"),
        ("model: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused(text, says, written):
    path = written(text=text)
    for form in (("--config", path), (f"--config={path}",)):
        message = refusal(*form)
        assert str(path) in message
        assert says in message


@pytest.mark.parametrize(
    ("again", "key"),
    [
        ("training:\n  seed: 1\n", "training"),
        ("data: {path: x}\ndata: {verify: false}\n", "data"),
        ("deepspeed:\n  zero_stage: 1\n  zero_stage: 2\n", "zero_stage"),
    ],
)
def test_a_key_given_twice_is_refused(again, key, written):
    """YAML's parser would silently drop the first of them."""
    path = written()
    path.write_text(path.read_text() + again)
    message = refusal("--config", path)
    assert re.search(rf"\b{key}\b", message)
    assert "required" not in message


# --- what overrules what --------------------------------------------------------------------------


def test_options_overrule_the_yaml_and_the_yaml_the_defaults(written):
    default = parse("--config", written())
    in_yaml = parse("--config", written({"training.seed": 5}))
    as_option = parse("--config", written({"training.seed": 5}), "--training.seed", "7")
    assert [r.training.seed for r in (default, in_yaml, as_option)] == [0, 5, 7]


def test_options_overrule_the_yaml_wherever_they_stand(written):
    path = written({"training.seed": 5})
    assert parse("--training.seed", "7", "--config", path).training.seed == 7
    assert parse("--training.seed=7", f"--config={path}").training.seed == 7


def test_an_option_leaves_the_rest_of_its_block(written):
    path = written({"training.seed": 5, "data.path": "here"})
    changed = parse("--config", path, "--training.max_steps", "3", "--data.verify", "false")
    expected = parse("--config", path)
    expected.training.max_steps, expected.data.verify = 3, False
    assert changed == expected


def test_the_last_of_two_equal_options_counts(written):
    options = ("--model.num_layers", "3", "--model.num_layers", "5")
    assert parse("--config", written(), *options).model.num_layers == 5


def test_values_are_typed(written):
    options = ("--training.learning_rate", "1e-3", "--model.r", "null", "--data.final_split")
    run = parse("--config", written(), *options, "null")
    assert run.training.learning_rate == 1e-3
    assert run.model.r is None
    assert run.data.final_split is None


def test_a_number_without_a_point_in_the_yaml_is_one(written):
    """YAML 1.1 takes 4e-3 for a string."""
    path = written()
    path.write_text(path.read_text().replace("learning_rate: 0.01", "learning_rate: 4e-3"))
    assert parse("--config", path).training.learning_rate == 4e-3


def test_a_single_rank_can_be_overruled(written):
    path = written({"model.r": {"q": 1, "k": 4, "ffn": 2}})
    assert parse("--config", path, "--model.r.q", "3").model.r == Ranks(q=3, k=4, ffn=2)


def test_ranks_can_be_given_where_there_are_none(written):
    path = written({"model.r": None})
    assert parse("--config", path, "--model.r.q", "3").model.r == Ranks(q=3)
    assert parse("--config", path, "--model.r", "{q: 3, ffn: 5}").model.r == Ranks(q=3, ffn=5)
    assert parse("--config", path, "--model.r", "8").model.r == 8


def test_a_single_rank_over_an_integer_keeps_the_others(written):
    """`r: 4` is q, k, v and o alike, so `--model.r.q 3` changes q and leaves three at 4."""
    run = parse("--config", written({"model.r": 4}), "--model.r.q", "3")
    assert run.model.ranks == Ranks(q=3, k=4, v=4, o=4)


# --- the configuration folder ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_a_name_is_looked_up_in_the_folder(form, written, tmp_path, monkeypatch):
    path = written({"training.seed": 11})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert parse(*form.format(path.name).split(), folder=tmp_path).training.seed == 11
    assert "no such file" in refusal(*form.format(path.name).split()).lower()


@pytest.mark.parametrize("ending", ["", ".yaml"])
def test_a_name_below_the_folder_is_found(ending):
    assert parse("--config", f"paper/setting2_130m_lpa{ending}").training.seed == 27


def test_a_file_that_is_here_comes_before_the_folder(written, tmp_path, monkeypatch):
    path = written({"training.seed": 11}).rename(tmp_path / "lpa_tiny.yaml")
    monkeypatch.chdir(tmp_path)
    assert parse("--config", path.name).training.seed == 11


@pytest.mark.parametrize("option", ["--data.path", "--training.run_dir", "--training.resume"])
def test_other_options_are_not_looked_up_in_the_folder(option, written, tmp_path, monkeypatch):
    """Only --config names a file of the folder: --output must never write over one."""
    path = written()
    monkeypatch.chdir(tmp_path)
    run = parse("--config", path, option, "lpa_tiny.yaml")
    block, name = option.removeprefix("--").split(".")
    assert getattr(getattr(run, block), name) == "lpa_tiny.yaml"


def test_options_of_the_command_come_back(written):
    def add_options(parser: Any) -> None:
        parser.add_argument("--dry-run", action="store_true", help="")
        parser.add_argument("--output", help="")

    run, options = parse_options(
        RunConfig,
        ["--config", str(written()), "--dry-run", "--output", "lpa_tiny.yaml"],
        prog="train.py",
        description="",
        config_folder=CONFIG_FOLDER,
        add_options=add_options,
    )
    assert isinstance(run, RunConfig)
    assert options.dry_run is True
    assert options.output == "lpa_tiny.yaml"


def test_the_help_describes_every_key(capsys):
    """A field whose description was lost, or swallowed by the field before it, has none."""
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    entries = re.split(r"\n  (?=--)", text)
    described = {}
    for entry in entries[1:]:
        flag, _, rest = entry.partition(" ")
        described[flag] = re.split(r"\((?:required|type|default)", rest.split("\n\n")[0])[0]
    missing = []
    for key in [f"--{block}.{name}" for block, name in every_key()]:
        words = described[key].split()
        if len(words) < 4:
            missing.append(key)
    assert missing == []
    swallowed = [f"{name}:" for _, name in every_key() if f" {name}: " in " ".join(text.split())]
    assert swallowed == []


def every_key() -> list[tuple[str, str]]:
    run = yaml.safe_load(parse("--config", "lpa_tiny.yaml").to_yaml())
    return [(block, name) for block, fields in run.items() for name in fields]
