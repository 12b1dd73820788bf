"""What the conversion can be told."""

from dataclasses import dataclass
from typing import Literal

from model import Ranks


@dataclass
class ConvertConfig:
    """Converts a dense Llama-like checkpoint into an LPA model.

    Attributes:
        output: The checkpoint to write, a folder that does not exist.
        from_llama: A Hugging Face folder of a LlamaForCausalLM: config.json and safetensors.
        checkpoint: Instead of from_llama a vanilla run directory of ours (its newest checkpoint) or
            a checkpoint's folder.
        tokenizer: A SentencePiece model; null: tokenizer.model in the folder.
        rank: An integer (q, k, v and o alike) or {q, k, v, o, ffn}, each an integer or null
            (dense), as model.r; null: nothing is factorised.
        parameter_budget: Instead of rank: keep at most this share, over 0 and at most 1, of the
            parameters of the attention's projections, with the ranks that lose least.
        method: "svd" (truncated SVD) or "fwsvd" (weighted by the Fisher information of --data).
        data: A prepared folder: calibration text of fwsvd, and the text to score before and after.
        calibration_split: The split that fwsvd reads.
        calibration_tokens: Tokens of it to read, from its start.
        split: The split to score.
        max_tokens: Score only this many tokens from its start; null: all.
        seq_len: Tokens of a window; null: as a checkpoint of ours was trained, and 1024 or the
            model's maximum for from_llama.
        micro_batch_size: Windows in one forward pass of a score.
        device: "auto" (the GPU where there is one), "cpu" or "cuda".
        report: A JSON file for the numbers.
    """

    output: str
    from_llama: str | None = None
    checkpoint: str | None = None
    tokenizer: str | None = None
    rank: int | Ranks | None = None
    parameter_budget: float | None = None
    method: Literal["svd", "fwsvd"] = "svd"
    data: str | None = None
    calibration_split: str = "train"
    calibration_tokens: int = 65536
    split: str = "test"
    max_tokens: int | None = None
    seq_len: int | None = None
    micro_batch_size: int = 8
    device: Literal["auto", "cpu", "cuda"] = "auto"
    report: str | None = None

    def __post_init__(self) -> None:
        if (self.from_llama is None) == (self.checkpoint is None):
            given = "neither" if self.from_llama is None else "both"
            raise ValueError(f"--from_llama, --checkpoint: {given} is given; give one of the two")
        if self.tokenizer is not None and self.checkpoint is not None:
            raise ValueError("--tokenizer: a checkpoint of ours has its own; leave it out")
        if self.rank is not None and self.parameter_budget is not None:
            raise ValueError("--parameter_budget: it chooses the ranks; leave --rank out")
        if self.parameter_budget is not None and not 0 < self.parameter_budget <= 1:
            raise ValueError(
                f"--parameter_budget: {self.parameter_budget}; it must be over 0 and at most 1"
            )
        if self.method == "fwsvd" and self.data is None:
            raise ValueError("--method: fwsvd needs --data, a prepared folder to calibrate on")
        for name in ("calibration_tokens", "max_tokens", "seq_len", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}: {value}; it must be at least 1")

    @property
    def source(self) -> str:
        """What is converted, as it was named."""
        found = self.from_llama or self.checkpoint
        assert found is not None
        return found
