"""Exports a checkpoint for other programs.

python -m model.export --checkpoint RUN_OR_STEP_DIR --format llama --output DIR
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data.command_line import parse_options
from data.errors import run_cli
from data.writing import new_folder, require_new
from model.export.card import write_card
from model.export.factorised import write_hugging_face
from model.export.hugging_face_files import require_transformers
from model.export.llama import refuse_others, write_llama
from model.export.ours import write_ours
from model.export.source import open_source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class ExportConfig:
    """Exports a checkpoint for other programs.

    Attributes:
        checkpoint: A run directory (its newest checkpoint) or a checkpoint's folder.
        format: "llama" (factors multiplied out, a plain LlamaForCausalLM), "hf" (factors as they
            are, LpaForCausalLM with its code) or "safetensors" (our own names and files).
        output: A folder to write, which must not exist.
        precision: "fp32" or "bf16" weights.
    """

    checkpoint: str
    format: Literal["llama", "hf", "safetensors"]
    output: str
    precision: Literal["fp32", "bf16"] = "fp32"


def export(config: ExportConfig) -> int:
    """Writes the folder; the parameters of the model in it. InputError, with nothing written, on
    what cannot be exported.
    """
    output, dtype = Path(config.output), DTYPES[config.precision]
    require_new(output)
    source = open_source(config.checkpoint)
    if config.format == "llama":
        refuse_others(source.config)
    if config.format != "safetensors":
        require_transformers()
    write = {"llama": write_llama, "hf": write_hugging_face, "safetensors": write_ours}
    with new_folder(output) as folder:
        count = write[config.format](source, dtype, folder)
        write_card(source, config.format, dtype, count, folder)
    return count


def main() -> int:
    """The command."""
    config, _ = parse_options(
        ExportConfig, prog="python -m model.export", description="Exports a checkpoint."
    )
    count = export(config)
    size = sum(path.stat().st_size for path in Path(config.output).rglob("*") if path.is_file())
    print(
        f"{config.output}: format {config.format}, {count:,} parameters in {config.precision}, "
        f"{size / 1e6:,.1f} MB"
    )
    return 0


if __name__ == "__main__":
    run_cli(main)
