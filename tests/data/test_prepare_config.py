import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml

from data.errors import InputError
from data.prepare_config import CONFIG_FOLDER, PrepareConfig, parse_config

MINIMAL = ["--input", "a.txt", "--output", "out", "--vocab_size", "300"]
CONFIGS = sorted(CONFIG_FOLDER.glob("*.yaml"))


def yaml_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_the_configs_that_are_there():
    names = ["c4", "embedded", "pile", "wikipedia", "wikitext103"]
    assert [path.stem for path in CONFIGS] == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_parse_by_path_and_by_name(path):
    config = parse_config(["--config", str(path)])
    assert (
        config == parse_config([f"--config={path.stem}"]) == parse_config(["--config", path.name])
    )
    for key, value in yaml.safe_load(path.read_text()).items():
        assert getattr(config, key) == value
    assert config.output == f"prepared/{path.stem}"
    assert path.read_text().startswith("# ")
    assert f"--config configs/data/{path.name}" in path.read_text()


def test_every_option_has_a_type_a_docstring_and_a_line_of_help(capsys):
    names = [field.name for field in dataclasses.fields(PrepareConfig)]
    source = inspect.getsource(PrepareConfig)
    docs = dict(re.findall(r'^    (\w+): [^\n]*\n    """(\w.{20})', source, re.M))
    assert list(docs) == names
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in names:
        assert f"--{name}" in text
        assert docs[name] in text


@pytest.mark.parametrize("place", [0, 2, 6])
def test_command_line_beats_yaml_wherever_config_stands(place, tmp_path):
    path = yaml_file(tmp_path, "vocab_size: 7\nsplit_seed: 5\ninput: [x, y]\nembedded: true\n")
    argv = [*MINIMAL[:place], "--config", str(path), *MINIMAL[place:]]
    config = parse_config(argv)
    assert (config.vocab_size, config.split_seed, config.input) == (300, 5, ["a.txt"])
    assert config.embedded
    assert not parse_config([*argv, "--embedded", "false"]).embedded


def test_defaults():
    config = parse_config(MINIMAL)
    assert (config.valid_fraction, config.test_fraction) == (0.01, 0.01)
    assert config.shard_tokens == 2**26
    assert config.processes is not None
    assert config.processes >= 1
    given = parse_config([*MINIMAL, "--valid_input", "b", "--dataset", "d"])
    assert (given.valid_fraction, given.test_fraction) == (0.0, 0.01)


def test_recorded_options_leave_out_what_does_not_change_the_result():
    one = parse_config([*MINIMAL, "--processes", "1", "--overwrite", "--summary", "s"])
    assert one.recorded() == parse_config([*MINIMAL, "--processes", "2"]).recorded()
    assert one.recorded() != parse_config([*MINIMAL, "--split_seed", "2"]).recorded()


BAD_COMMANDS = {
    "no output": (["--input", "a", "--vocab_size", "300"], "output is not set"),
    "no input": (["--output", "o", "--vocab_size", "300"], "give at least one of --input"),
    "no tokenizer": (["--input", "a", "--output", "o"], "neither of tokenizer and vocab_size"),
    "two tokenizers": ([*MINIMAL, "--tokenizer", "t"], "both of tokenizer and vocab_size"),
    "unknown": ([*MINIMAL, "--inptu", "x"], "unknown option --inptu; did you mean input?"),
    "hyphen": ([*MINIMAL, "--split-seed", "1"], "did you mean split_seed?"),
    "abbreviation": ([*MINIMAL, "--vocab", "1"], "did you mean vocab_size?"),
    "word": (["word", *MINIMAL], "unexpected argument 'word'"),
    "type": ([*MINIMAL, "--split_seed", "x"], "split_seed is 'x'; allowed is an integer"),
    "float": ([*MINIMAL, "--vocab_size", "1.5"], "vocab_size is '1.5'; allowed is an integer or"),
    "no value": ([*MINIMAL, "--tokenizer"], "--tokenizer: expected one argument"),
    "bool": ([*MINIMAL, "--embedded", "maybe"], "maybe"),
    "no config": ([*MINIMAL, "--config"], "--config: the YAML file after it is missing"),
    "config": (["--config", "nope"], "--config nope: No such file; the names in"),
    "fraction": ([*MINIMAL, "--valid_fraction", "1"], "valid_fraction is 1.0; allowed is 0 or"),
    "negative": ([*MINIMAL, "--test_fraction", "-0.1"], "test_fraction is -0.1; allowed"),
    "nan": ([*MINIMAL, "--test_fraction", "nan"], "test_fraction is 'nan'; allowed"),
    "sum": ([*MINIMAL, "--valid_fraction", "0.6", "--test_fraction", "0.5"], "sum up to 1 or"),
    "valid twice": (
        [*MINIMAL, "--valid_fraction", "0.1", "--valid_input", "v"],
        "valid_fraction is 0.1 and the valid split is given as well",
    ),
    "processes": ([*MINIMAL, "--processes", "0"], "processes is 0; allowed is 1 or more"),
    "shards": ([*MINIMAL, "--shard_tokens", "0"], "shard_tokens is 0; allowed is 1 or more"),
    "seed": ([*MINIMAL, "--split_seed", "-1"], "split_seed is -1; allowed is 0 or more"),
    "limit": ([*MINIMAL, "--max_documents", "0"], "max_documents is 0; allowed is 1 or more"),
    "expression": ([*MINIMAL, "--document_start", "("], "document_start '(': is not a regular"),
    "no dataset": ([*MINIMAL, "--dataset_config", "en"], "no effect without --dataset"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_command(case, run_prepare):
    argv, message = BAD_COMMANDS[case]
    result = run_prepare(*argv)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1


BAD_YAML = {
    "unknown key": ("inputs: [a]", "unknown key inputs; did you mean input?"),
    "type": ("vocab_size: many", "vocab_size is 'many'; allowed is an integer or null"),
    "true is no number": ("vocab_size: true", "vocab_size is 'True'; allowed is an integer or"),
    "null": ("text_key: null", "text_key is empty; allowed"),
    "number in list": ("input: [1]", "input is '1'; allowed is a list of texts"),
    "list": ("input: {a: 1}", "allowed is a list of texts"),
    "bool": ("embedded: 3", "embedded is '3'; allowed is true or false"),
    "not a mapping": ("- a\n- b", "a mapping of keys is expected"),
    "empty": ("", "a mapping of keys is expected"),
    "syntax": ("input: [a", "not valid YAML"),
    "bytes": ("\x00", "not valid YAML"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_bad_yaml(case, tmp_path, run_prepare):
    text, message = BAD_YAML[case]
    path = yaml_file(tmp_path, text)
    result = run_prepare("--config", path, *MINIMAL)
    assert result.code == 2, result
    assert message in result.err
    assert str(path) in result.err or case == "null"
    assert result.err.count("\n") == 1


def test_types_are_checked_for_yaml_that_the_command_line_overrides(tmp_path):
    path = yaml_file(tmp_path, "vocab_size: many")
    with pytest.raises(InputError, match="vocab_size is 'many'"):
        parse_config(["--config", str(path), *MINIMAL])
