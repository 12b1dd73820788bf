"""Spectra: against closed forms, the product itself, and activations captured another way."""

import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError, run_cli
from eval.analysis import __main__ as command
from eval.analysis import page
from eval.analysis.activations import MICRO_BATCH, SITES, Moments, activation_moments, bounds
from eval.analysis.measure import measure
from eval.analysis.plots import FILES, plots
from eval.analysis.runs import open_sources
from eval.analysis.spectrum import Spectrum, product_singular_values, singular_values
from eval.analysis.summary import over_layers, spectra_over_layers
from eval.analysis.weights import weight_spectra
from kernels import reference
from model import ModelConfig, Ranks, Transformer, init_weights
from tests.conftest import VOCAB
from tests.eval.test_perplexity import other_tokenizer
from training import checkpoint

CPU = torch.device("cpu")
SAVED: dict[str, Any] = {"vocab_size": VOCAB, "max_seq_len": 32}  # as the runs of conftest
NO_ONE_MATRIX: dict[str, Any] = {
    **SAVED,
    "latent_activation": "silu",
    "r": Ranks(q=3, k=3, v=3, o=3, ffn=3),
}


def measures(weight: torch.Tensor) -> dict[str, Any]:
    return Spectrum.of_weight(
        singular_values(weight), min(weight.shape), min(weight.shape)
    ).measures()


@pytest.mark.parametrize("d", [1, 7, 100])
def test_identity_uses_every_dimension(d: int):
    found = measures(torch.eye(d))
    assert found["effective_rank"] == pytest.approx(d)
    assert found["stable_rank"] == pytest.approx(d)
    assert found["rank_90_percent_energy"] == math.ceil(0.9 * d)
    assert found["rank_99_percent_energy"] == math.ceil(0.99 * d)
    assert found["effective_rank_share"] == pytest.approx(1)


def test_rank_one_is_one_dimension():
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(9, generator=generator), torch.randn(5, generator=generator)
    found = measures(torch.outer(u, v).double())
    for name in ("effective_rank", "stable_rank"):
        assert found[name] == pytest.approx(1, abs=1e-5)
        assert found[f"{name}_share"] == pytest.approx(1 / 5, abs=1e-5)
    assert (found["rank_90_percent_energy"], found["rank_99_percent_energy"]) == (1, 1)


def test_a_known_spectrum_under_rotations():
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(6, 4, generator=generator).double()).Q
    v = torch.linalg.qr(torch.randn(4, 4, generator=generator).double()).Q
    found = measures(u @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]).double()) @ v.T)
    # p = 1/2, 1/4, 1/8, 1/8: 1.75 bits. Energies 16, 4, 1, 1 of 22.
    assert found["effective_rank"] == pytest.approx(2**1.75)
    assert found["stable_rank"] == pytest.approx(22 / 16)
    assert found["rank_90_percent_energy"] == 2
    assert found["rank_99_percent_energy"] == 4
    assert found["rank_90_percent_energy_share"] == 0.5
    moment = Spectrum.of_moment(torch.diag(torch.tensor([1.0, 4.0, 2.0, 1.0])), 4)
    assert moment.values.tolist() == [4, 2, 1, 1]
    assert moment.measures()["effective_rank"] == pytest.approx(2**1.75)
    assert moment.measures()["stable_rank"] == pytest.approx(2)
    assert moment.measures()["rank_90_percent_energy"] == 4  # 7 of 8 are too few
    normalised = moment.normalised()
    assert normalised is not None
    assert normalised.tolist() == pytest.approx([1, math.sqrt(0.5), 0.5, 0.5])


def test_zeros_have_no_rank():
    zeros = Spectrum.of_weight(torch.zeros(3), 3, 3)
    assert set(zeros.measures().values()) == {None}
    assert zeros.normalised() is None
    some = Spectrum.of_weight(torch.ones(3), 3, 3)
    mixed = [{"q_proj": one.measures(), "k_proj": some.measures()} for one in (zeros, some)]
    found = over_layers(mixed)
    assert found["q_proj"]["effective_rank"] is None, "not the mean of the layers that have one"
    assert found["attention"]["effective_rank_share"] is None
    assert found["k_proj"]["effective_rank"]["mean"] == pytest.approx(3)
    drawn = spectra_over_layers([{"q_proj": zeros}, {"q_proj": some}])
    assert drawn["q_proj"]["mean"] == [1, 1, 1]
    assert spectra_over_layers([{"q_proj": zeros}]) == {}


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_product_has_the_singular_values_of_the_product(d_out: int, d_in: int, data: Any):
    r = data.draw(st.integers(1, min(d_out, d_in)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    b, a = torch.randn(d_out, r, generator=generator), torch.randn(r, d_in, generator=generator)
    expected = torch.linalg.svdvals(b.double() @ a.double())
    found = product_singular_values(b, a)
    assert found.shape == (r,)
    torch.testing.assert_close(found, expected[:r], rtol=1e-9, atol=1e-12)


def test_groups_are_means_of_shares_by_layer():
    def one(share: float) -> dict[str, float]:
        names = (
            "effective_rank",
            "stable_rank",
            "rank_90_percent_energy",
            "rank_99_percent_energy",
        )
        return {f"{name}_share": share for name in names}

    layers = [
        {"q_proj": one(0.1), "o_proj": one(0.3), "up_proj": one(0.9)},
        {"q_proj": one(0.2), "o_proj": one(0.6), "up_proj": one(0.7)},
    ]
    found = over_layers(layers)
    expected = {"mean": 0.3, "min": 0.2, "max": 0.4}
    assert found["attention"]["effective_rank_share"] == pytest.approx(expected)
    assert found["ffn"]["stable_rank_share"] == pytest.approx({"mean": 0.8, "min": 0.7, "max": 0.9})


def test_long_spectra_are_thinned_but_not_at_their_ends():
    values = torch.linspace(1, 0.001, 3000, dtype=torch.float64)
    found = spectra_over_layers([{"q": Spectrum.of_weight(values, 4000, 3000)}])["q"]
    assert len(found["position"]) <= 256
    assert found["position"][:3] == pytest.approx([1 / 4000, 2 / 4000, 3 / 4000])
    assert found["position"][-1] == pytest.approx(3000 / 4000)
    assert found["mean"][-1] == pytest.approx(0.001)


def tiny(**changes: Any) -> Transformer:
    fields: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_seq_len": 16,
        "r": 5,
    }
    model = Transformer(ModelConfig(**fields | changes)).eval()
    init_weights(model, 3)
    return model


@pytest.mark.parametrize("r", [None, 5, Ranks(q=3, o=7, ffn=6)])
def test_weights_are_those_of_the_svd(r: Any):
    model = tiny(r=r)
    layers = weight_spectra(model)
    for number, layer in enumerate(layers):
        for name, found in layer.items():
            owner = "attention" if name in model.config.attention_projections() else "feed_forward"
            module = model.get_submodule(f"layers.{number}.{owner}.{name}")
            low = hasattr(module, "A")
            weight: Any = module.B.double() @ module.A.double() if low else module.weight.double()
            expected = torch.linalg.svdvals(weight.detach())
            assert found.bound == (module.rank if low else min(weight.shape))
            assert found.dimension == min(weight.shape)
            torch.testing.assert_close(found.values, expected[: found.bound], atol=1e-9, rtol=1e-7)
    assert list(layers[0]) == list(model.config.block_projections())


def test_what_is_no_one_matrix_is_left_out():
    assert list(weight_spectra(tiny(latent_norm=True))[0]) == [
        "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    silu = tiny(latent_activation="silu", r=Ranks(q=3, k=3, v=3, o=3, ffn=3))
    assert weight_spectra(silu) == [{}, {}]


def test_a_mean_far_away_costs_no_digits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(101, 6, generator=generator).double() + 1e6
    moments = Moments(6, CPU)
    for part in x.split(17):
        moments.add(part)
    expected = torch.cov(x.T, correction=0)
    torch.testing.assert_close(moments.centred(), expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(moments.uncentred(), x.T @ x / len(x), rtol=1e-12, atol=0)


@torch.no_grad()
def captured(model: Transformer, window: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Every site of a window (T,), computed from the parameters alone; (T, width) each."""
    config = model.config
    x = model.token_embedding.weight[window]
    rotary = reference.rotary_table(torch.arange(len(window)), config.head_dim, config.rope_theta)
    later = torch.ones(len(window), len(window), dtype=torch.bool).triu(1)

    def norm(x: torch.Tensor, layer: Any) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight

    def linear(x: torch.Tensor, layer: Any) -> torch.Tensor:
        return x @ layer.A.T @ layer.B.T if hasattr(layer, "A") else x @ layer.weight.T

    found = []
    for block in model.layers:
        at, ffn, site = block.attention, block.feed_forward, {}
        site["attention_input"] = norm(x, block.attention_norm)
        for name in "qkv":
            site[name] = linear(site["attention_input"], getattr(at, f"{name}_proj"))
        q, k = (
            reference.apply_rotary(site[name].unflatten(-1, (-1, config.head_dim))[None], *rotary)[
                0
            ]
            for name in "qk"
        )
        heads = []
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            scores = q[:, head] @ k[:, shared].T / math.sqrt(config.head_dim)
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            v = site["v"].unflatten(-1, (-1, config.head_dim))[:, shared]
            heads.append(weights @ v)
        site["heads"] = torch.cat(heads, dim=-1)
        site["attention_output"] = linear(site["heads"], at.o_proj)
        x = x + site["attention_output"]
        site["ffn_input"] = norm(x, block.feed_forward_norm)
        gate, up = (linear(site["ffn_input"], layer) for layer in (ffn.gate_proj, ffn.up_proj))
        site["ffn_hidden"] = F.silu(gate) * up
        site["ffn_output"] = linear(site["ffn_hidden"], ffn.down_proj)
        x = x + site["ffn_output"]
        site["residual"] = x
        found.append(site)
    return found


@pytest.mark.parametrize("r", [None, 5])
def test_activations_are_those_of_an_independent_forward_pass(r: int | None):
    model = tiny(r=r, init_std=0.2)
    # More windows than a micro-batch, and a shorter one at the end.
    tokens = torch.randint(
        50, (16 * (MICRO_BATCH + 2) + 7,), generator=torch.Generator().manual_seed(1)
    )
    expected = [captured(model, window) for window in tokens.split(16)]
    layers = activation_moments(model, tokens, 16)
    for number, layer in enumerate(layers):
        assert set(layer) == set(SITES)
        for name, moments in layer.items():
            x = torch.cat([one[number][name] for one in expected]).double()
            assert moments.count == len(tokens) == len(x)
            covariance = torch.cov(x.T, correction=0)
            torch.testing.assert_close(moments.centred(), covariance, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(moments.uncentred(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
            bound = bounds(model.config, centred=True)[name]
            assert Spectrum.of_moment(covariance, bound).energies[bound:].sum() < 1e-9
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks), "hooks are taken off again"


@pytest.mark.parametrize(
    ("changes", "outputs"),
    [
        ({"r": Ranks(v=4)}, (16, 16)),  # four heads of a dense o_proj have 4 dimensions each
        ({"r": Ranks(v=4, o=9)}, (9, 9)),
        ({"r": Ranks(v=4), "num_kv_heads": 2}, (16, 16)),
        ({"r": Ranks(v=11)}, (32, 32)),
        ({"r": Ranks(v=2, o=20)}, (8, 8)),
        ({"r": Ranks(v=2, o=20), "latent_activation": "silu"}, (20, 20)),  # it is curved
        ({"r": Ranks(v=4, ffn=5), "family": "paper-1"}, (16, 17)),
        ({"r": Ranks(q=5, k=5, o=5), "family": "paper-1"}, (5, 6)),
        ({"r": None, "family": "paper-1", "head_dim": 4}, (16, 17)),
    ],
    ids=str,
)
def test_bounds_are_the_least(changes: dict[str, Any], outputs: tuple[int, int]):
    """Each is the rank that random weights and biases reach, found in float64."""
    fields = {"hidden_size": 32, "num_kv_heads": 4, "num_layers": 1, "dropout": 0.0}
    model = tiny(**fields | changes).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).double() / 2
    tokens = torch.randint(50, (640,), generator=generator)
    (moments,) = activation_moments(model, tokens, 16)
    for centred, output in zip((True, False), outputs, strict=True):
        most = bounds(model.config, centred)
        assert most["attention_output"] == output
        for name in ("q", "k", "v", "heads", "attention_output", "ffn_output"):
            moment = moments[name].centred() if centred else moments[name].uncentred()
            spectrum = Spectrum.of_moment(moment, most[name])
            reached = int((spectrum.energies > 1e-13 * spectrum.energies[0]).sum())
            assert reached == most[name], (name, centred)


def test_what_is_not_finite_is_refused():
    model = tiny()
    model.layers[1].attention.q_proj.A.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.attention\.q_proj: .*not finite"):
        weight_spectra(model)
    with pytest.raises(InputError, match="layer 2: q is not finite"):
        activation_moments(model, torch.arange(20), 16)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Cells(HTMLParser):
    """The <data> of each table's rows: (run, kind, name) -> values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str, str], list[float]] = {}
        self.table, self.row, self.external = ("", ""), "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        at = {key: value or "" for key, value in attrs}
        if tag == "table":
            self.table = (at["data-run"], at["data-kind"])
        if tag == "tr":
            self.row = at.get("data-name", "")
        if tag == "data":
            self.found.setdefault((*self.table, self.row), []).append(float(at["value"]))
        for key in ("src", "srcset", "href"):
            self.external |= not at.get(key, "data:").startswith("data:")


@pytest.fixture(scope="module")
def analysed(
    trained: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """The page of a run and of one of its checkpoints, and the command."""
    folder = tmp_path_factory.mktemp("analysis") / "new" / "page"
    one = f"one={trained / 'checkpoints' / 'step-00000003'}"
    options = [str(trained), one, "--data", str(prepared), "--split", "test"]
    options += ["--max_tokens", "333", "--device", "cpu", "--output"]
    assert command.main([*options, str(folder)]) == 0
    return folder, options


def test_command_writes_page_plots_and_numbers(analysed: Any, trained: Path, prepared: Path):
    folder, _ = analysed
    expected = {"index.html", "analysis.json", *(f"{name}.png" for name in FILES)}
    assert {path.name for path in folder.iterdir()} == expected
    found = json.loads((folder / "analysis.json").read_text())
    run, one = found["runs"]
    assert (run["name"], one["name"]) == ("run", "one")
    steps = [(point["step"], point["training_tokens"]) for point in run["checkpoints"]]
    assert steps == [(0, 0), (3, 768), (6, 1536)]
    assert one["checkpoints"] == run["checkpoints"][:2]
    assert (run["analysed_tokens"], run["seq_len_tokens"]) == (333, 32)
    assert found["warnings"] == []
    model = checkpoint.load_model(checkpoint.resolve(trained), CPU, torch.float32)
    layer = run["checkpoints"][-1]["weights"]["by_layer"][1]
    for name, spectrum in weight_spectra(model)[1].items():
        assert layer[name] == spectrum.measures()
    start = Transformer(model.config)
    init_weights(start, 5)
    first = run["checkpoints"][0]["weights"]["by_layer"][0]
    assert first["up_proj"] == weight_spectra(start)[0]["up_proj"].measures()
    assert run["ranks"]["weights"]["q_proj"] == {"dimension": 32, "bound": 8, "bound_share": 0.25}
    assert run["ranks"]["centred"]["v"]["bound_share"] == 0.25
    assert all(layer[n]["rank_99_percent_energy"] <= 8 for n in ("q_proj", "v_proj", "o_proj"))


def test_page_shows_the_numbers_of_the_json(analysed: Any):
    folder, _ = analysed
    text = (folder / "index.html").read_text()
    cells = Cells()
    cells.feed(text)
    assert not cells.external, "one file, without a network"
    run = json.loads((folder / "analysis.json").read_text())["runs"][0]
    last, first = run["checkpoints"][-1]["weights"], run["checkpoints"][0]["weights"]
    row = cells.found["run", "weights", "q_proj"]
    rank = last["over_layers"]["q_proj"]["effective_rank"]
    share = last["over_layers"]["q_proj"]["effective_rank_share"]
    assert row[:4] == [rank["mean"], share["mean"], share["min"], share["max"]]
    assert row[4] == first["over_layers"]["q_proj"]["effective_rank"]["mean"]
    ffn = run["checkpoints"][-1]["centred"]["over_layers"]["ffn"]["effective_rank_share"]
    assert cells.found["run", "activations", "ffn"][0] == ffn["mean"]
    seen = text[text.index('id="seen"') : text.index("</header>")]
    assert f"{100 * ffn['mean']:.1f} %" in seen
    assert str(folder.parent.parent) not in text, "no path of this machine"


@pytest.mark.slow
def test_same_input_gives_the_same_bytes(analysed: Any, tmp_path: Path):
    folder, options = analysed
    assert command.main([*options, str(tmp_path)]) == 0
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_warnings(trained: Path, prepared: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step-00000003" / "model.safetensors"
    weights.write_bytes(b"torn")
    (tmp_path / "run" / "checkpoints" / "step-00000009").mkdir()  # a save that was cut off
    (tmp_path / "short.txt").write_text("A short text.")
    options = [str(tmp_path / "run"), "--data", str(tmp_path / "short.txt"), "--device", "cpu"]
    found = command.analyse(command.parse([*options, "--output", str(tmp_path / "page")]))
    assert [point["step"] for point in found["runs"][0]["checkpoints"]] == [0, 6]
    few, damaged = found["warnings"]
    assert "fewer than the 48 dimensions of FFN hidden" in few
    assert damaged == "run: damaged, and left out: step-00000003"
    shown = page.render(found, [])
    assert few in shown
    assert damaged in shown


def saved(model: Transformer, like: Path, folder: Path) -> Path:
    """A checkpoint of a model, with the rest as another has it."""
    import safetensors.torch

    from data.shards import sha256_file

    shutil.copytree(like, folder)
    state = checkpoint.read_state(folder)
    model.config.to_json(folder / "model.json")
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    for name in ("model.json", "model.safetensors"):
        file = folder / name
        state["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    checkpoint.write_state(folder, state)
    return folder


def measured(model: Transformer, trained: Path, folder: Path) -> dict[str, Any]:
    """The measurements of a checkpoint of a model."""
    like = trained / "checkpoints" / "step-00000006"
    (source,) = open_sources([str(saved(model, like, folder))])
    found = measure(source, torch.arange(100), CPU, torch.float32)
    assert [point["step"] for point in found["checkpoints"]] == [0, 6]
    return found


def analysis_of(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"data": "text", "split": None, "precision": "fp32", "warnings": [], "runs": list(runs)}


def test_page_of_matrices_of_zeros_and_of_no_one_matrix(trained: Path, tmp_path: Path):
    zeros = measured(tiny(zero_init_outputs=True, **SAVED), trained, tmp_path / "zeros")
    silu = measured(tiny(**NO_ONE_MATRIX), trained, tmp_path / "silu")
    start = zeros["checkpoints"][0]
    assert start["weights"]["over_layers"]["o_proj"]["effective_rank"] is None
    assert start["centred"]["over_layers"]["ffn_output"]["stable_rank"] is None
    assert start["centred"]["over_layers"]["ffn"]["stable_rank_share"] is None
    assert len(silu["projections_left_out"]) == 7
    assert silu["checkpoints"][1]["weights"] == {"by_layer": [{}, {}], "over_layers": {}}
    text = page.render(analysis_of(zeros, silu), plots([zeros, silu]))
    cells = Cells()
    cells.feed(text)
    assert ("zeros", "weights", "o_proj") in cells.found
    assert 'data-run="zeros" data-kind="weights"' in text
    assert 'data-run="silu" data-kind="weights"' not in text
    assert "<strong>silu</strong>: of the weights n/a;" in text


@pytest.mark.slow
def test_no_plots_of_weights_where_there_are_none(trained: Path, tmp_path: Path):
    silu = measured(tiny(**NO_ONE_MATRIX), trained, tmp_path / "silu")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "weights_spectra.png").write_text("of a page before")
    page.write_page(tmp_path / "page", analysis_of(silu))
    pngs = {path.stem for path in (tmp_path / "page").glob("*.png")}
    assert pngs == {"activations_spectra", "activations_by_layer", "activations_by_tokens"}


def test_an_error_names_run_and_step(trained: Path, tmp_path: Path):
    model = tiny(**SAVED)
    model.layers[0].feed_forward.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"broken, step 6: layers\.0\.feed_forward\.up_proj: "):
        measured(model, trained, tmp_path / "broken")


def test_the_other_family(trained: Path, tmp_path: Path):
    model = tiny(family="paper-1", **SAVED)
    run = measured(model, trained, tmp_path / "paper")
    assert list(run["shapes"]) == list(run["checkpoints"][1]["weights"]["by_layer"][0])
    assert "gate_proj" not in run["shapes"]
    assert 'data-name="down_proj"' in page.render(analysis_of(run), [])
    ranks = [run["ranks"][kind]["attention_output"]["bound"] for kind in ("centred", "uncentred")]
    assert ranks == [5, 6]  # the bias of o_proj


def test_interrupted_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "index.html").write_text("before")
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name.startswith("index"):
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        page.write_page(tmp_path, analysis_of())
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_text() == "before"


@pytest.fixture
def places(trained: Path, prepared: Path, tmp_path: Path) -> dict[str, str]:
    """What the arguments of the next test stand for."""
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bare").mkdir()
    (tmp_path / "torn" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "torn" / "checkpoints" / "step-00000001" / "checkpoint.json").write_text("{")
    names = {name: tmp_path / name for name in ("file", "bare", "torn", "out", "nowhere")}
    names |= {"below": tmp_path / "file" / "out", "empty": tmp_path / "empty.txt"}
    names |= {"RUN": trained, "DATA": prepared, "OTHER": tmp_path / "other"}
    return {key: str(path) for key, path in names.items()}


GOOD = ["--data", "DATA", "--output", "out"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", *GOOD], "nowhere: no such folder; a run directory or a checkpoint"),
        (["bare", *GOOD], "bare: no whole checkpoint in it"),
        (["torn", *GOOD], "torn: no whole checkpoint in it"),
        (["RUN", "again=RUN", *GOOD], "run: given twice"),
        (["=RUN", *GOOD], "the name before = is missing"),
        (["a=RUN", "a=RUN/checkpoints/step-00000003", *GOOD], "a: the name of two runs"),
        (["RUN", "--data", "OTHER", "--output", "out"], "its tokenizer (sha256"),
        (["RUN", "--data", "empty", "--output", "out"], "empty"),
        (["RUN", "--data", "nowhere", "--output", "out"], "nowhere"),
        (["RUN", "--split", "dev", *GOOD], "has no split 'dev'"),
        (["RUN", "--data", "DATA", "--output", "file"], "is a file; a folder is expected"),
        (["RUN", "--data", "DATA", "--output", "below"], "is a file; a folder is expected"),
        (["RUN", "--max_tokens", "0", *GOOD], "--max_tokens: 0; it must be at least 1"),
        (["RUN", "--data", "DATA"], "--output"),
        (["RUN", "--precision", "fp8", *GOOD], "invalid choice: 'fp8'"),
    ],
)
def test_bad_input_is_refused_with_one_line(
    arguments: list[str], expected: str, places: dict[str, str], prepared: Path
):
    def spelled(argument: str) -> str:
        name, equals, path = argument.rpartition("=")
        head, slash, tail = path.partition("/")
        return name + equals + places.get(head, head) + slash + tail

    if "OTHER" in arguments:
        other_tokenizer(prepared, Path(places["OTHER"]))
    with pytest.raises((InputError, OSError)) as caught:
        command.main([spelled(argument) for argument in arguments])
    assert expected in str(caught.value)
    assert not Path(places["out"]).exists()


def test_several_processes_are_refused(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch, prepared: Path
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="runs in one process"):
        command.main([places["RUN"], "--data", str(prepared), "--output", places["out"]])


def test_exit_code_of_bad_input(capsys: Any):
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: command.main(["nowhere", "--data", "x", "--output", "y"]))
    assert caught.value.code == 2
    line = "error: nowhere: no such folder; a run directory or a checkpoint is expected\n"
    assert capsys.readouterr() == ("", line)
