"""Spectra of the projections of a model."""

from data.errors import InputError
from eval.analysis.spectrum import Spectrum, product_singular_values, singular_values
from model import ModelConfig, Transformer
from model.projection import Dense, LowDim
from model.shape import Shape

Layer = dict[str, Spectrum]


def left_out(config: ModelConfig) -> list[str]:
    """The projections that are no one matrix: a norm or an activation stands between B and A."""
    return [name for name, shape in config.block_projections().items() if not _linear(shape)]


def _linear(shape: Shape) -> bool:
    return shape.rank is None or (shape.latent_eps is None and not shape.latent_silu)


def weight_spectra(model: Transformer) -> list[Layer]:
    """For each layer the spectrum of each projection, W or the product B·A, by name; without those
    of `left_out`. Biases play no part. InputError where a weight is not finite.
    """
    shapes = model.config.block_projections()
    names = [name for name in shapes if name not in left_out(model.config)]
    layers = []
    for number in range(len(model.layers)):
        layer: Layer = {}
        for name in names:
            owner = "attention" if name in model.config.attention_projections() else "feed_forward"
            path = f"layers.{number}.{owner}.{name}"
            layer[name] = _spectrum(model, path, shapes[name])
        layers.append(layer)
    return layers


def _spectrum(model: Transformer, path: str, shape: Shape) -> Spectrum:
    module = model.get_submodule(path)
    weights = [weight.detach() for weight in module.parameters()]
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise InputError(f"{path}: its weights are not finite; use an earlier checkpoint")
    if isinstance(module, LowDim):
        values = product_singular_values(module.B.detach(), module.A.detach())
    else:
        assert isinstance(module, Dense)
        values = singular_values(module.weight.detach())
    return Spectrum.of_weight(values, min(shape.d_in, shape.d_out), len(values))
