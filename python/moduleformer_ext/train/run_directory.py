"""The folder of one run, and what is where in it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moduleformer_ext.data import (
    TOKENIZER,
    Dataset,
    build_dataset,
    library_fingerprint,
    load_tokenizer,
    open_dataset,
    standard_library,
    text_files,
    write_tokenizer,
)
from moduleformer_ext.files import (
    new_directory,
    read_json,
    read_text,
    remove_directory,
    remove_partial,
    to_json,
    write_file,
)
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.train.checkpoints import CheckpointStore
from moduleformer_ext.train.config import TrainConfig
from moduleformer_ext.train.metrics import MetricsLog

_CONFIG = "run.json"
_LOCK = ".lock"
_SOURCE = "source.txt"
"""In data/: what the tokens were made of, where that was the standard library."""


class RunDirectory:
    """run.json, base/ (the model that a fine-tuning starts from), data/, baselines.json, plan.json,
    checkpoints/step-N/, metrics.jsonl, evaluation.json, samples.txt and expert_usage.png.

    Each is written once, atomically, in this order; what exists already is reused, which is how a run that was
    stopped anywhere goes on. Only who holds `lock` writes or deletes; reading needs no lock.
    """

    def __init__(self, root: Path, config: TrainConfig) -> None:
        self.root = root
        self.config = config
        self.checkpoints = CheckpointStore(root / "checkpoints", config.keep_checkpoints)
        events = root / "tensorboard" if "tensorboard" in config.log else None
        self.metrics = MetricsLog(root / "metrics.jsonl", events)
        self.base = root / "base"
        self.data = root / "data"
        self.baselines = root / "baselines.json"
        self.plan = root / "plan.json"
        self.evaluation = root / "evaluation.json"
        self.samples = root / "samples.txt"
        self.expert_usage = root / "expert_usage.png"

    @classmethod
    def create(
        cls, root: Path, config: TrainConfig, base: tuple[MoLMForCausalLM, Path] | None = None
    ) -> "RunDirectory":
        """Start a run in a folder that is new, empty, or holds a run that never got to its first step.

        `base` is a model to start from and its tokenizer, as `load_tokenizer` takes it; the run keeps copies of both.
        """
        check_outside(root)
        run = cls(root, config)
        if not is_run(root) and root.exists() and (not root.is_dir() or any(p.name != _LOCK for p in root.iterdir())):
            raise FileExistsError(f"run: '{root}' is not an empty folder; choose another")
        root.mkdir(parents=True, exist_ok=True)
        with run.lock():
            if run.plan.exists():
                raise FileExistsError(
                    f"run: '{root}' already holds a run; continue it with --resume, or choose another folder"
                )
            for made in (run.data, run.base, root / "tensorboard"):
                if made.exists():
                    remove_directory(made)
            run.baselines.unlink(missing_ok=True)
            if base is not None:
                model, tokenizer = base
                with new_directory(run.base) as scratch:
                    model.save_pretrained(scratch)
                    write_tokenizer(tokenizer, scratch)
            write_file(root / _CONFIG, to_json(config))
        return run

    def configure(self, config: TrainConfig) -> None:
        """Go on with another configuration, before the first step; the texts and their tokens stay as they are."""
        if self.plan.exists():
            raise FileExistsError(f"run: '{self.root}' must not have begun to train when it is configured")
        write_file(self.root / _CONFIG, to_json(config))
        self.config = config

    def discard(self) -> None:
        """Remove what `create` and the stages after it wrote, unless the run got to its first step."""
        if not self.plan.exists():
            for folder in (self.data, self.base):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (self.baselines, self.root / _CONFIG, self.root / _LOCK):
                file.unlink(missing_ok=True)
            if not any(self.root.iterdir()):
                self.root.rmdir()

    @classmethod
    def replace(cls, root: Path, config: TrainConfig) -> "RunDirectory":
        """Start anew where there may be an earlier run, whose tokens stay if they are of the same texts."""
        if not is_run(root):
            return cls.create(root, config)
        run, kept = cls(root, config), root.with_name(f".{root.name}.tokens")
        with run.lock():
            source = run.data / _SOURCE
            if source.is_file() and read_text(source) == run._source():
                shutil.rmtree(kept, ignore_errors=True)
                run.data.rename(kept)
            shutil.rmtree(root)
        run = cls.create(root, config)
        if kept.exists():
            kept.rename(run.data)
        return run

    @classmethod
    def open(cls, root: Path) -> "RunDirectory":
        """Open a run that `create` started."""
        if not is_run(root):
            raise FileNotFoundError(f"run: '{root}' is not a run directory ({_CONFIG} is missing)")
        return cls(root, read_json(root / _CONFIG, TrainConfig))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run alone while the block runs; a process that dies lets go of it.

        Raises:
            BlockingIOError: somebody else holds it.
        """
        try:
            with FileLock(self.root / _LOCK, timeout=0):
                remove_partial(self.root)
                yield
        except Timeout as error:
            raise BlockingIOError(f"run: '{self.root}' is being trained by another process") from error

    def dataset(self) -> Dataset:
        """The tokenised corpus; made from the texts at first, from disk ever after."""
        if self.data.exists():
            return open_dataset(self.data)
        config = self.config
        if config.text:
            documents = text_files(config.text, field=config.text_field, without=self.root, scratch=self.root)
        else:
            documents = standard_library()
        own = self.base / TOKENIZER if self.base.exists() else config.tokenizer
        dataset = build_dataset(
            self.data,
            documents,
            vocab_size=config.vocab_size,
            held_out_fraction=config.held_out,
            tokenizer=None if own is None else load_tokenizer(Path(own)),
        )
        if (made_of := self._source()) is not None:
            write_file(self.data / _SOURCE, made_of)
        return dataset

    def _source(self) -> str | None:
        """All that the tokens of the standard library depend on; None for other texts, which are read anew."""
        config = self.config
        if config.text or config.tokenizer is not None or self.base.exists():
            return None
        return f"{library_fingerprint()} vocab_size {config.vocab_size} held_out {config.held_out!r}\n"


def is_run(root: Path) -> bool:
    """Whether `root` is a run directory."""
    return (root / _CONFIG).is_file()


def run_around(path: Path) -> Path | None:
    """The run that something lies in."""
    return next((parent for parent in path.resolve().parents if is_run(parent)), None)


def check_outside(new: Path, *sources: Path) -> None:
    """Refuse a new folder in a run, or in what it is made of, which both have their own content."""
    places = [source.resolve() for source in sources]
    around = run_around(new) or next((place for place in places if place in new.resolve().parents), None)
    if around is not None:
        raise ValueError(
            f"'{new}' must lie outside of '{around}', which is a run or what is read; choose another folder"
        )
