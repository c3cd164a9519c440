"""Options and streams of the verbs that read text with a model."""

from pathlib import Path

from cyclopts import Parameter
from tokenizers import Tokenizer

from moduleformer_ext.cli.source import Running, load_source, run_of
from moduleformer_ext.data import FIELD, TokenStream, check_sources, open_dataset, text_files, tokenize_domains
from moduleformer_ext.display import progress
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.records import Count, Lanes, Text
from moduleformer_ext.train import Score, evaluate
from moduleformer_ext.train.config import Sources


@Parameter(name="*")
class Measuring(Running):
    """The text to read and how."""

    text: Sources = ()
    """files or folders with text, PATH or DOMAIN=PATH (default, for a run: its held-out text)"""
    text_field: Text = FIELD
    """field with the text in records of JSON lines, Parquet and Arrow"""
    batch_size: Lanes = 8
    """lanes read in parallel"""
    segment_length: Count = 512
    """tokens per forward pass"""

    def load(self, source: Path) -> tuple[MoLMForCausalLM, Tokenizer]:
        """The model, whose weights keep their type for bf16: autocast is what a run evaluates itself with. Texts that
        are not there are found first.
        """
        check_sources(self.text)
        return load_source(source, self.device, "auto" if self.dtype == "bf16" else self.dtype)

    def measure(self, source: Path, model: MoLMForCausalLM, tokenizer: Tokenizer) -> dict[str, Score]:
        """Read the given text, or the held-out one of the run `source`, domain by domain."""
        streams = self._streams(source, tokenizer)
        with progress("reading", sum(stream.num_scored for stream in streams.values()), keep=False) as bar:
            return evaluate(
                model,
                streams,
                batch_size=self.batch_size,
                segment_length=self.segment_length,
                dtype="bf16" if self.dtype == "bf16" else "fp32",
                advance=bar.advance,
            )

    def _streams(self, source: Path, tokenizer: Tokenizer) -> dict[str, TokenStream]:
        if self.text:
            return tokenize_domains(text_files(self.text, field=self.text_field), tokenizer)
        if (run := run_of(source)) is not None:
            return open_dataset(run.data).held_out
        raise ValueError(f"--text: '{source}' has no held-out text of its own; name files or folders")
