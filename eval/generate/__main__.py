"""Samples text from a checkpoint, printing it as it comes.

python -m eval.generate --checkpoint RUN_OR_STEP_DIR --prompt "The module"
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.command_line import parse_options
from data.errors import InputError, require_folder_of, run_cli
from data.tokenizer import Tokenizer
from eval.generate.complete import Completion, complete, complete_all
from eval.generate.config import GenerateConfig
from eval.generate.interactive import Session
from eval.generate.prompts import Prompt, read_prompts
from model import Transformer
from model.cache import cached_shapes
from model.configure import require_masks
from training import checkpoint, distributed
from training.execution import apply_execution
from training.run_dir import write_json


def _load(config: GenerateConfig, folder: Path) -> tuple[Transformer, Tokenizer]:
    tokenizer = checkpoint.load_tokenizer(folder)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    device = distributed.evaluation_device(config.device)
    model = checkpoint.load_model(folder, device, dtype)
    try:
        cached_shapes(model.config, config.cache)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    apply_execution(model, config.execution, device, dtype, training=False)
    return model, tokenizer


def _require_masks(
    model: Transformer, config: GenerateConfig, encoded: Sequence[Sequence[int]]
) -> None:
    """InputError where the attention that was asked for takes no mask, and the prompts need one."""
    ragged = config.batch_size > 1 and len({len(ids) for ids in encoded}) > 1
    if not ragged and model.config.document_start_id is None:
        return
    try:
        require_masks(model, config.cache)
    except ValueError as error:
        way_out = "; prompts of unequal lengths need a mask, or --batch_size 1" if ragged else ""
        raise InputError(f"--execution.{error}{way_out}") from None


def _encoded(
    prompts: Sequence[Prompt], config: GenerateConfig, tokenizer: Tokenizer, longest: int
) -> list[list[int]]:
    found = [tokenizer.encode_document(prompt.text) for prompt in prompts]
    for number, ids in enumerate(found, start=1):
        if len(ids) >= longest:
            where = "--prompt" if config.prompts is None else f"--prompts: number {number}"
            raise InputError(
                f"{where}: {len(ids)} tokens; the model's max_seq_len {longest} leaves no room "
                "for more"
            )
    return found


def _as_json(
    config: GenerateConfig,
    folder: Path,
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[Completion]],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Everything that was sampled; log-probabilities in nats."""

    def sample(one: Completion) -> dict[str, Any]:
        return {
            "text": one.text,
            "finish": one.finish,
            "tokens": [
                {"id": t.token, "text": tokenizer.decode([t.token]), "logprob_nats": t.logprob}
                for t in one.tokens
            ],
        }

    return {
        **asdict(config),
        "checkpoint": str(folder),
        "texts": [one.text for own in texts for one in own],
        "completions": [
            {**prompt.fields, "prompt": prompt.text, "samples": [sample(one) for one in own]}
            for prompt, own in zip(prompts, texts, strict=True)
        ],
    }


def _print(prompts: Sequence[Prompt], texts: Sequence[Sequence[Completion]]) -> None:
    whole = [
        prompt.text + one.text for prompt, own in zip(prompts, texts, strict=True) for one in own
    ]
    print(("\n" + "-" * 20 + "\n").join(whole), flush=True)


def main() -> int:
    """The command."""
    config, _ = parse_options(
        GenerateConfig, prog="python -m eval.generate", description="Samples from a checkpoint."
    )
    require_folder_of(config.output)
    prompts = (
        [Prompt(config.prompt, {})] if config.prompts is None else read_prompts(config.prompts)
    )
    folder = checkpoint.resolve(Path(config.checkpoint))
    model, tokenizer = _load(config, folder)
    if config.interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then has a history and editing
        _require_masks(model, config, [])
        Session(model, tokenizer, config).run()
        return 0
    encoded = _encoded(prompts, config, tokenizer, model.config.max_seq_len)
    _require_masks(model, config, encoded)
    if len(encoded) * config.num_samples == 1:
        print(prompts[0].text, end="", flush=True)
        texts = [
            complete(
                model, tokenizer, encoded, [config.seed], config,
                lambda piece: print(piece, end="", flush=True),
            )
        ]  # fmt: skip
        print()
    else:
        with tqdm(total=len(encoded) * config.num_samples, desc="texts", unit="text") as bar:
            texts = complete_all(model, tokenizer, encoded, config, bar.update)
        _print(prompts, texts)
    if config.output:
        write_json(Path(config.output), _as_json(config, folder, prompts, texts, tokenizer))
    return 0


if __name__ == "__main__":
    run_cli(main)
