"""A whole run from text to figures: every stage finds what earlier ones, or an earlier process, left."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from moduleformer_ext.data import ALL, Dataset, LaneReader, end_of_text_id, share_lanes
from moduleformer_ext.display import progress
from moduleformer_ext.distributed import ALONE, Processes
from moduleformer_ext.files import read_json, to_json, write_file, writing
from moduleformer_ext.heap import keep_freed_memory
from moduleformer_ext.models import MoLMConfig
from moduleformer_ext.models.checkpoint import StoredWeights
from moduleformer_ext.surgery import plot_expert_usage
from moduleformer_ext.train.baselines import BIGRAM, BitsPerByte, format_table, measure_baselines, per_byte
from moduleformer_ext.train.config import TrainConfig
from moduleformer_ext.train.evaluation import evaluate
from moduleformer_ext.train.finetune import finetuned_config
from moduleformer_ext.train.interrupt import InterruptGuard
from moduleformer_ext.train.plan import CLOSING_SECONDS, Plan, Speed, fastest, keep_threads, make_plan, measure_speed
from moduleformer_ext.train.run_directory import RunDirectory
from moduleformer_ext.train.samples import generate_samples
from moduleformer_ext.train.sizing import Size, choose_size
from moduleformer_ext.train.trainer import StepResult, Trainer

Say = Callable[[str], None]
MODEL_NAME = "MoLM"


def run_session(
    run: RunDirectory,
    *,
    started: float | None = None,
    say: Say = print,
    processes: Processes = ALONE,
    sizes: Sequence[Size] = (),
) -> bool:
    """Take the run to its end: data, baselines, training, evaluation, samples, figure.

    With `sizes`, for one process only, the run gets the largest that there is time for, as measured. `started` is when
    the wall-clock budget began (`time.monotonic`; default: now). Of several processes the first one writes and speaks.
    Returns False when a signal stopped the training early; the checkpoint is then written.
    """
    if sizes and processes.size > 1:
        raise ValueError(f"run_session: sizes must be left out with several processes, got {processes.size} processes")
    started = time.monotonic() if started is None else started
    keep_freed_memory()
    if not processes.is_first:
        say = _say_nothing
    with _locked(run, processes), keep_threads():
        check_division(run.config, processes)
        dataset = _prepare_data(run, say, processes)
        baselines = _prepare_baselines(run, dataset, say, processes)
        trainer = _prepare_trainer(run, dataset, started, say, processes, sizes)
        if not _train(run, trainer, say):
            return False
        _conclude(run, dataset, baselines, trainer, say)
    say(f"total time {time.monotonic() - started:.0f} s; everything is in {run.root}")
    return True


def check_division(config: TrainConfig, processes: Processes) -> None:
    """Refuse lanes, and experts, that cannot be shared as they should be."""
    parts = processes.size * config.micro_batches
    if config.batch_size % parts:
        shares = f"{processes.size} processes" if processes.size > 1 else "one process"
        raise ValueError(
            f"batch_size: {shares} with {config.micro_batches} micro-batches each must have a multiple of {parts} "
            f"lanes, got {config.batch_size}"
        )
    if processes.mesh is not None and processes.size % config.expert_parallel:
        raise ValueError(
            f"expert_parallel: must divide the {processes.size} processes, got {config.expert_parallel}; a run that is "
            "continued may take another"
        )


def check_model(model: MoLMConfig, config: TrainConfig, processes: Processes) -> None:
    """Refuse a model that cannot be spread over the processes."""
    if processes.mesh is not None and config.expert_parallel > 1:
        from moduleformer_ext.distributed.sharding import check_expert_mesh  # what it stands on takes a second

        check_expert_mesh(model, processes.size // config.expert_parallel)


def _say_nothing(_: str) -> None: ...


@contextmanager
def _locked(run: RunDirectory, processes: Processes) -> Iterator[None]:
    with ExitStack() as stack:
        processes.first(lambda: stack.enter_context(run.lock()))
        yield


def _prepare_data(run: RunDirectory, say: Say, processes: Processes) -> Dataset:
    start = time.monotonic()

    def build() -> None:
        run.dataset()

    processes.first(build)
    dataset = processes.together(run.dataset)
    for domain in dataset.domains:
        train, held_out = dataset.train[domain], dataset.held_out[domain]
        say(
            f"{domain}: {train.num_bytes / 1e6:.2f} MB in {train.num_documents} documents to train on, "
            f"{held_out.num_bytes / 1e6:.2f} MB in {held_out.num_documents} held out"
        )
    vocab_size = dataset.tokenizer.get_vocab_size()
    say(f"tokenised with a byte-level BPE of {vocab_size} entries ({time.monotonic() - start:.1f} s)")
    return dataset


def _prepare_baselines(run: RunDirectory, dataset: Dataset, say: Say, processes: Processes) -> BitsPerByte:
    def measure() -> None:
        if not run.baselines.exists():
            write_file(run.baselines, to_json(measure_baselines(dataset)))

    processes.first(measure)
    baselines = processes.together(lambda: read_json(run.baselines, BitsPerByte))
    say("held-out bits per byte of the baselines:\n" + format_table(baselines))
    return baselines


def _trainer_maker(
    config: TrainConfig, dataset: Dataset, base: StoredWeights | None, processes: Processes = ALONE
) -> Callable[..., Trainer]:
    tokenizer = dataset.tokenizer
    if base is None:
        architecture = config.architecture(tokenizer.get_vocab_size(), end_of_text_id(tokenizer))
    else:
        architecture = finetuned_config(base.config, config)

    def make_trainer(dtype: str, steps: int = 1_000_000) -> Trainer:
        sizes = {domain: stream.num_scored for domain, stream in dataset.train.items()}
        lanes = share_lanes(sizes, config.batch_size, config.domain_exponent)
        streams = {domain: stream.tokens for domain, stream in dataset.train.items()}
        reader = LaneReader(streams, lanes, config.segment_length, processes.own_part(config.batch_size))
        if processes.mesh is None:
            return Trainer(config, architecture, reader, steps=steps, dtype=dtype, base=base)
        from moduleformer_ext.train.sharded import ShardedTrainer  # what it stands on takes a second to import

        return ShardedTrainer(config, architecture, reader, processes, steps=steps, dtype=dtype, base=base)

    return make_trainer


def _fit_size(run: RunDirectory, dataset: Dataset, sizes: Sequence[Size], deadline: float, say: Say) -> Speed:
    """Configure the run with the size that there is time for. Returns its speed."""
    measured: dict[str, Speed] = {}
    held_out = sum(stream.num_scored for stream in dataset.held_out.values())

    def measure(size: Size) -> float:
        config = size.applied(run.config)
        make_trainer = _trainer_maker(config, dataset, None)
        if measured:  # which dtype and how many threads are fastest showed at the first size
            seconds, threads = next(iter(measured.values()))
            speed = measure_speed(make_trainer, fastest(seconds), threads=threads)
        else:
            speed = measure_speed(make_trainer, config.dtype)
        measured[size.name] = speed
        return speed.best

    def spare(seconds: float, size: Size) -> float:
        config = size.applied(run.config)
        # Evaluation is the forward pass alone, which is a third of a step.
        evaluation = held_out / (config.batch_size * config.segment_length) * seconds / 3
        return deadline - CLOSING_SECONDS - evaluation - time.monotonic()

    choice = choose_size(sizes, measure, spare)
    run.configure(choice.size.applied(run.config))
    if choice.size is not sizes[0]:
        say(
            f"this machine takes {measured[sizes[0].name].best:.2f} s for a step of the {sizes[0].name} model: "
            f"it trains the {choice.size.name} one"
        )
    if not choice.enough:
        minutes = run.config.minutes + choice.seconds_short / 60
        say(
            f"there is time for {choice.steps} steps of {choice.seconds_per_step:.2f} s, and it takes about "
            f"{choice.size.steps} to be ahead of the {BIGRAM} model: expect to end behind it, or give it "
            f"--minutes {math.ceil(minutes)}"
        )
    return measured[choice.size.name]


def _prepare_trainer(
    run: RunDirectory, dataset: Dataset, started: float, say: Say, processes: Processes, sizes: Sequence[Size]
) -> Trainer:
    base = processes.together(lambda: StoredWeights(run.base)) if run.base.exists() else None
    if not processes.first(run.plan.exists):
        deadline = started + 60.0 * run.config.minutes if run.config.minutes else None
        speed = _fit_size(run, dataset, sizes, deadline, say) if sizes and deadline is not None else None
        config = run.config
        plan = make_plan(
            _trainer_maker(config, dataset, base, processes),
            dataset.held_out,
            dtype=config.dtype,
            steps=config.steps,
            deadline=deadline,
            speed=speed,
            processes=processes,
        )
        processes.first(lambda: write_file(run.plan, to_json(plan)))
    make_trainer = _trainer_maker(run.config, dataset, base, processes)
    plan = processes.together(lambda: read_json(run.plan, Plan))
    for dtype, seconds in plan.seconds_per_step.items():
        say(f"measured {seconds:.3f} s per step in {dtype} with {plan.threads or torch.get_num_threads()} threads")
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    trainer = make_trainer(plan.dtype, plan.steps)
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    some = "" if trained == size else f"{trained / 1e6:.2f} M of "
    many = f", {processes.size} processes" if processes.mesh else ""
    say(f"training {some}{size / 1e6:.1f} M parameters in {plan.dtype} for {plan.steps} steps{many}")
    if (checkpoint := processes.first(run.checkpoints.latest)) is not None:
        processes.together(lambda: trainer.load(checkpoint))
        say(f"continuing from {checkpoint}")
    processes.first(lambda: run.metrics.rewind(trainer.step))
    return trainer


def _train(run: RunDirectory, trainer: Trainer, say: Say) -> bool:
    """Take the remaining steps. Returns False if a signal came first."""
    processes, checkpoints = trainer.processes, run.checkpoints
    with (
        InterruptGuard() as guard,
        progress("training", trainer.steps, trainer.step, silent=not processes.is_first) as bar,
    ):
        smoothed: float | None = None
        clock = time.monotonic()
        while trainer.step < trainer.steps and not processes.largest(float(guard.requested)):
            result = trainer.take_step()
            smoothed = result.loss if smoothed is None else 0.9 * smoothed + 0.1 * result.loss
            now = time.monotonic()
            speed, clock = trainer.tokens_per_step / (now - clock), now
            bar.advance(1, f"loss {smoothed:.3f}, {speed:.0f} tokens/s, load entropy {result.load_entropy:.3f}")
            due = trainer.step % run.config.log_every == 0 or trainer.step == trainer.steps
            if processes.is_first and due:
                _log_step(run, trainer, result, speed)
            if trainer.step % run.config.checkpoint_every == 0:
                checkpoints.save(trainer.step, trainer.save, processes)
            checkpoints.poll()
        checkpoint = checkpoints.save(trainer.step, trainer.save, processes)
        checkpoints.finish()
    if trainer.step < trainer.steps:
        say(f"interrupted at step {trainer.step} of {trainer.steps}; saved {checkpoint}")
        return False
    return True


def _log_step(run: RunDirectory, trainer: Trainer, result: StepResult, speed: float) -> None:
    run.metrics.append(
        event="step",
        step=trainer.step,
        tokens=trainer.step * trainer.tokens_per_step,
        tokens_per_second=round(speed, 1),
        **result._asdict(),
    )


def _conclude(run: RunDirectory, dataset: Dataset, baselines: BitsPerByte, trainer: Trainer, say: Say) -> None:
    processes = trainer.processes
    scores = evaluate(
        trainer.model,
        dataset.held_out,
        batch_size=run.config.batch_size,
        segment_length=run.config.segment_length,
        dtype=trainer.dtype,
        processes=processes,
    )
    bits = {domain: score.bits for domain, score in scores.items()}
    sizes = {domain: score.num_bytes for domain, score in scores.items()}
    results = {**baselines, MODEL_NAME: per_byte(bits, sizes)}
    perplexity = {domain: score.perplexity for domain, score in scores.items()}
    record = {"step": trainer.step, "bits_per_byte": results, "perplexity": perplexity}

    def write_results() -> None:
        write_file(run.evaluation, to_json(record))
        run.metrics.append(event="evaluation", **record)
        say("\nheld-out bits per byte:\n" + format_table(results))
        if results[MODEL_NAME][ALL] >= results[BIGRAM][ALL]:
            say(_behind(trainer, dataset))
        with writing(run.expert_usage):
            plot_expert_usage(run.expert_usage, {domain: score.usage for domain, score in scores.items()})
        say(f"\nexpert usage by domain: {run.expert_usage}")

    processes.first(write_results)
    samples = generate_samples(trainer.model, dataset, seed=run.config.seed)  # all hold a part of the model
    processes.first(lambda: write_file(run.samples, samples))
    say("\n" + samples)


def _behind(trainer: Trainer, dataset: Dataset) -> str:
    """Why a model may be no better than counting pairs of tokens, and what helps."""
    read = trainer.steps * trainer.tokens_per_step
    text = sum(stream.num_scored for stream in dataset.train.values())
    return (
        f"the model is behind the {BIGRAM} model, which counted all {text / 1e6:.2f} M tokens of the text: it read "
        f"{read / 1e6:.2f} M in {trainer.steps} steps. A slow or busy machine takes fewer steps in the same time: give "
        "it more minutes or steps, or a smaller model"
    )
