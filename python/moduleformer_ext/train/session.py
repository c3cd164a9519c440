"""A whole run from text to figures: every stage finds what earlier ones, or an earlier process, left."""

import time
from collections.abc import Callable

from moduleformer_ext.data import ALL, Dataset, LaneReader, end_of_text_id, share_lanes
from moduleformer_ext.display import progress
from moduleformer_ext.files import read_json, to_json, write_file, writing
from moduleformer_ext.heap import keep_freed_memory
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import plot_expert_usage
from moduleformer_ext.train.baselines import BIGRAM, BitsPerByte, format_table, measure_baselines, per_byte
from moduleformer_ext.train.evaluation import evaluate
from moduleformer_ext.train.finetune import finetuned_config
from moduleformer_ext.train.interrupt import InterruptGuard
from moduleformer_ext.train.plan import Plan, make_plan
from moduleformer_ext.train.run_directory import RunDirectory
from moduleformer_ext.train.samples import generate_samples
from moduleformer_ext.train.trainer import StepResult, Trainer

Say = Callable[[str], None]
MODEL_NAME = "MoLM"


def run_session(run: RunDirectory, *, started: float | None = None, say: Say = print) -> bool:
    """Take the run to its end: data, baselines, training, evaluation, samples, figure.

    `started` is when the wall-clock budget began (`time.monotonic`; default: now). Returns False when a signal
    stopped the training early; the checkpoint is then written.
    """
    started = time.monotonic() if started is None else started
    keep_freed_memory()
    with run.lock():
        dataset = _prepare_data(run, say)
        baselines = _prepare_baselines(run, dataset, say)
        trainer = _prepare_trainer(run, dataset, started, say)
        if not _train(run, trainer, say):
            return False
        _conclude(run, dataset, baselines, trainer, say)
    say(f"total time {time.monotonic() - started:.0f} s; everything is in {run.root}")
    return True


def _prepare_data(run: RunDirectory, say: Say) -> Dataset:
    start = time.monotonic()
    dataset = run.dataset()
    for domain in dataset.domains:
        train, held_out = dataset.train[domain], dataset.held_out[domain]
        say(
            f"{domain}: {train.num_bytes / 1e6:.2f} MB in {train.num_documents} documents to train on, "
            f"{held_out.num_bytes / 1e6:.2f} MB in {held_out.num_documents} held out"
        )
    vocab_size = dataset.tokenizer.get_vocab_size()
    say(f"tokenised with a byte-level BPE of {vocab_size} entries ({time.monotonic() - start:.1f} s)")
    return dataset


def _prepare_baselines(run: RunDirectory, dataset: Dataset, say: Say) -> BitsPerByte:
    if not run.baselines.exists():
        write_file(run.baselines, to_json(measure_baselines(dataset)))
    baselines = read_json(run.baselines, BitsPerByte)
    say("held-out bits per byte of the baselines:\n" + format_table(baselines))
    return baselines


def _prepare_trainer(run: RunDirectory, dataset: Dataset, started: float, say: Say) -> Trainer:
    base = MoLMForCausalLM.from_pretrained(run.base) if run.base.exists() else None
    config, tokenizer = run.config, dataset.tokenizer
    if base is None:
        architecture = config.architecture(tokenizer.get_vocab_size(), end_of_text_id(tokenizer))
    else:
        architecture = finetuned_config(base.config, config)
    weights = None if base is None else base.state_dict()

    def make_trainer(dtype: str, steps: int = 1_000_000) -> Trainer:
        sizes = {domain: stream.num_scored for domain, stream in dataset.train.items()}
        lanes = share_lanes(sizes, config.batch_size, config.domain_exponent)
        streams = {domain: stream.tokens for domain, stream in dataset.train.items()}
        reader = LaneReader(streams, lanes, config.segment_length)
        return Trainer(config, architecture, reader, steps=steps, dtype=dtype, base=weights)

    if not run.plan.exists():
        deadline = started + 60.0 * config.minutes if config.minutes else None
        plan = make_plan(make_trainer, dataset.held_out, dtype=config.dtype, steps=config.steps, deadline=deadline)
        write_file(run.plan, to_json(plan))
    plan = read_json(run.plan, Plan)
    for dtype, seconds in plan.seconds_per_step.items():
        say(f"measured {seconds:.3f} s per step in {dtype}")
    trainer = make_trainer(plan.dtype, plan.steps)
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    some = "" if trained == size else f"{trained / 1e6:.2f} M of "
    say(f"training {some}{size / 1e6:.1f} M parameters in {plan.dtype} for {plan.steps} steps")
    if (checkpoint := run.checkpoints.latest()) is not None:
        trainer.load(checkpoint)
        say(f"continuing from {checkpoint}")
    run.metrics.rewind(trainer.step)
    return trainer


def _train(run: RunDirectory, trainer: Trainer, say: Say) -> bool:
    """Take the remaining steps. Returns False if a signal came first."""
    with InterruptGuard() as guard, progress("training", trainer.steps, trainer.step) as bar:
        smoothed: float | None = None
        clock = time.monotonic()
        while trainer.step < trainer.steps and not guard.requested:
            result = trainer.take_step()
            smoothed = result.loss if smoothed is None else 0.9 * smoothed + 0.1 * result.loss
            now = time.monotonic()
            speed, clock = trainer.reader.num_tokens / (now - clock), now
            bar.advance(1, f"loss {smoothed:.3f}, {speed:.0f} tokens/s, load entropy {result.load_entropy:.3f}")
            if trainer.step % run.config.log_every == 0 or trainer.step == trainer.steps:
                _log_step(run, trainer, result, speed)
            if trainer.step % run.config.checkpoint_every == 0:
                run.checkpoints.save(trainer.step, trainer.save)
        checkpoint = run.checkpoints.save(trainer.step, trainer.save)
    if trainer.step < trainer.steps:
        say(f"interrupted at step {trainer.step} of {trainer.steps}; saved {checkpoint}")
        return False
    return True


def _log_step(run: RunDirectory, trainer: Trainer, result: StepResult, speed: float) -> None:
    run.metrics.append(
        event="step",
        step=trainer.step,
        tokens=trainer.step * trainer.reader.num_tokens,
        tokens_per_second=round(speed, 1),
        **result._asdict(),
    )


def _conclude(run: RunDirectory, dataset: Dataset, baselines: BitsPerByte, trainer: Trainer, say: Say) -> None:
    scores = evaluate(
        trainer.model,
        dataset.held_out,
        batch_size=run.config.batch_size,
        segment_length=run.config.segment_length,
        dtype=trainer.dtype,
    )
    bits = {domain: score.bits for domain, score in scores.items()}
    sizes = {domain: score.num_bytes for domain, score in scores.items()}
    results = {**baselines, MODEL_NAME: per_byte(bits, sizes)}
    perplexity = {domain: score.perplexity for domain, score in scores.items()}
    record = {"step": trainer.step, "bits_per_byte": results, "perplexity": perplexity}
    write_file(run.evaluation, to_json(record))
    run.metrics.append(event="evaluation", **record)
    say("\nheld-out bits per byte:\n" + format_table(results))
    if results[MODEL_NAME][ALL] >= results[BIGRAM][ALL]:
        say(_behind(trainer, dataset))

    with writing(run.expert_usage):
        plot_expert_usage(run.expert_usage, {domain: score.usage for domain, score in scores.items()})
    say(f"\nexpert usage by domain: {run.expert_usage}")
    samples = generate_samples(trainer.model, dataset, seed=run.config.seed)
    write_file(run.samples, samples)
    say("\n" + samples)


def _behind(trainer: Trainer, dataset: Dataset) -> str:
    """Why a model may be no better than counting pairs of tokens, and what helps."""
    read = trainer.steps * trainer.reader.num_tokens
    text = sum(stream.num_scored for stream in dataset.train.values())
    return (
        f"the model is behind the {BIGRAM} model, which counted all {text / 1e6:.2f} M tokens of the text: it read "
        f"{read / 1e6:.2f} M in {trainer.steps} steps. A slow or busy machine takes fewer steps in the same time: give "
        "it more minutes or steps, or a smaller model"
    )
