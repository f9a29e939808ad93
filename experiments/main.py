"""Train a network dense and by SCL, side by side, and report: the main job.

python -m experiments.main mnist5k_lenet300 --seeds 3

A run that was killed goes on from its last checkpoints when it is started again with
the same settings and `--out` with its folder. Several processes run together where
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say so.
"""

import contextlib
import dataclasses
import logging
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import scl_jax
from experiments import configs, figures
from experiments.checkpoint import CheckpointError
from experiments.config import Config
from experiments.data import DataError, Dataset, load
from experiments.mesh import join_processes
from experiments.network import make_network
from experiments.outcome import (
    Result,
    as_markdown,
    as_text,
    comparison,
    in_words,
    make_report,
    make_result,
)
from experiments.record import RunFolder, RunFolderError
from experiments.train import Metrics, Trained, TrainingError, train

COMPARED = ("dense", "scl")  # methods, in the order of the table
# What a user can mend; anything else is a defect of ours and is called so.
EXPECTED = (
    *(ValueError, OSError),
    *(DataError, RunFolderError, TrainingError, CheckpointError),
)
log = logging.getLogger("experiments")


class Terminated(KeyboardInterrupt):
    """SIGTERM: what a scheduler sends before it kills."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The settings of a run."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: str | None = None  # the run folder, new or to go on; else runs/NAME/TIME
    data_dir: str | None = None  # prepared TFDS data sets; TFDS's default if left out
    workers: int = 8  # processes that read imagenet2012; the others need none
    debug: bool = False  # show the traceback of an error


@contextlib.contextmanager
def _listening() -> Iterator[None]:
    """Print what is logged; take that and the handler of SIGTERM back at the end."""
    heard, level, handler = (
        signal.getsignal(signal.SIGTERM),
        log.level,
        logging.StreamHandler(),
    )
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # the root's handler, which Orbax adds, would repeat it
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = True
        signal.signal(signal.SIGTERM, heard)


@_listening()
def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit code, 0 only if all of it succeeded."""
    debug = "--debug" in argv
    try:
        name, arguments = parse(argv)
        join_processes()
        signal.signal(signal.SIGTERM, _terminate)  # joining sets a handler of its own
        # Before the folder is made: who has to get the data first repeats the command.
        data = _load(arguments)
        folder = RunFolder(arguments.out, name, arguments.config)
    except EXPECTED as error:
        return _failed(error, debug)
    except KeyboardInterrupt as interrupt:
        _say("Interrupted before the run began.")
        return _exit_code(interrupt)
    try:
        with logging_redirect_tqdm([log]):
            run(arguments.config, data, folder)
    except KeyboardInterrupt as interrupt:
        _say(
            f"Interrupted. What was logged until now is in {folder.path}; the same "
            f"settings with --out {folder.path} go on from the last checkpoint."
        )
        return _exit_code(interrupt)
    except Exception as error:
        return _failed(error, debug)
    return 0


def parse(argv: Sequence[str]) -> tuple[str, Arguments]:
    """Read an experiment's name and what to override of its settings."""
    experiments = "\n".join(f"  {x:24} {configs.summary(x)}" for x in configs.names())
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__, "\nExperiments:\n", experiments, sep="")
        print("\nSettings: python -m experiments.main NAME --help")
        raise SystemExit(0)
    name, *overrides = argv
    arguments = tyro.cli(
        Arguments,
        prog=f"python -m experiments.main {name}",
        description=configs.summary(name),
        default=Arguments(configs.load_config(name)),
        args=overrides,
    )
    return name, arguments


def _load(arguments: Arguments) -> Dataset:
    config = arguments.config
    if config.dataset == "imagenet2012":
        from experiments.imagenet import open_streams  # importing it takes seconds

        return open_streams(config, arguments.data_dir, arguments.workers)
    print(f"Loading {config.dataset}", flush=True)
    data = load(
        config.dataset, validation=config.validation, data_dir=arguments.data_dir
    )
    counts = ", ".join(
        f"{len(split.labels):,} to {purpose}"
        for split, purpose in zip(data, ("train", "validate", "test"), strict=True)
    )
    print(f"{config.dataset}: {counts}")
    return data


def run(config: Config, data: Dataset, folder: RunFolder) -> list[Result]:
    """Train every method with every seed, and fill the run folder."""
    print(f"Writing to {folder.path}")
    trained = {
        method: list(_train_with_progress(config, data, method, folder))
        for method in COMPARED
    }
    # The test set is looked at here, once, when nothing can be chosen any more.
    results = [
        make_result(config, one, data.test) for many in trained.values() for one in many
    ]
    if jax.process_index() == 0:
        _write(config, trained, results, folder)
    return results


def _train_with_progress(
    config: Config, data: Dataset, method: str, folder: RunFolder
) -> Iterator[Trained]:
    """Train the seeds of one method; log each epoch, show where it is."""
    bar = tqdm(
        total=config.epochs * config.seeds,
        desc=method,
        unit="epoch",
        disable=jax.process_index() > 0,
    )

    def on_epoch(metrics: Metrics) -> None:
        folder.append_metrics(metrics._asdict())
        accuracy = metrics.validation_accuracy
        bar.set_postfix(
            seed=metrics.seed,
            loss=f"{metrics.loss:.4f}",
            accuracy=f"{metrics.train_accuracy if accuracy is None else accuracy:.4f}",
            sparsity=f"{metrics.sparsity:.4f}",
            refresh=False,
        )
        bar.update()

    with contextlib.closing(bar):
        where = folder.path / "checkpoints"
        for trained in train(config, data, method, on_epoch=on_epoch, folder=where):
            folder.write_params(f"folded-{method}-seed{trained.seed}", trained.folded)
            yield trained


def _write(
    config: Config,
    trained: dict[str, list[Trained]],
    results: list[Result],
    folder: RunFolder,
) -> None:
    """Write and print the tables, and draw the figures."""
    cells, words = comparison(results), in_words(results)
    reports = [make_report(config, one) for one in trained["scl"]]
    layers = f"SCL layer by layer (seed {config.seed})"
    print(f"\n{as_text(cells)}\n\n{layers}\n\n{reports[0]}\n")
    print(textwrap.fill(words, 88))

    folder.write_json("results.json", [dataclasses.asdict(r) for r in results])
    figures.draw_training(
        [
            metrics
            for many in trained.values()
            for one in many
            for metrics in one.history
        ],
        folder.path / "training.png",
    )
    figures.draw_layers(reports, folder.path / "layers.png")
    inputs = ""
    image: Any = make_network(config).example.shape[1:]
    first = _first_kernel(reports[0], image)
    if first:
        masks = [_mask(one, first) for one in trained["scl"]]
        figures.draw_inputs(masks, image, folder.path / "inputs.png")
        inputs = "\n\n![connections per input](inputs.png)"
    folder.write_text(
        "report.md",
        f"# {config.model} on {config.dataset}: dense and SCL\n\n{words}\n\n"
        f"{as_markdown(cells)}\n\nAccuracy on the test set after the last epoch, mean "
        "± standard deviation over the seeds; connections are nonzero kernel weights; "
        "MACs per example, FLOPs = 2 x MACs.\n\n"
        "![sparsity and accuracy](training.png)\n\n"
        f"## {layers}\n\n{reports[0].to_markdown()}\n\n![layers](layers.png)"
        f"{inputs}\n",
    )
    print(f"\nReport, figures and parameters: {folder.path}")


def _first_kernel(report: scl_jax.Report, shape: tuple[int, ...]) -> str | None:
    """Return the path of the first kernel that can read an image; None for text.

    Convolutions come before dense kernels, of which later ones may fit by chance.
    """
    if len(shape) != 3:
        return None
    convolutions = [r for r in report.rows if len(r.shape) == 4]
    dense = [r for r in report.rows if len(r.shape) == 2]
    fitting = [r.path for r in convolutions if r.shape[2] == shape[2]]
    fitting += [r.path for r in dense if r.shape[0] == np.prod(shape)]
    return next(iter(fitting), None)


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return 128 and the signal's number, as shells have it."""
    kind = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
    return 128 + kind


def _mask(trained: Trained, path: str) -> np.ndarray:
    masks = scl_jax.binary_masks(trained.trained)
    for key in path.split("/"):
        masks = masks[key]
    return np.asarray(masks)


def _failed(error: Exception, debug: bool) -> int:
    if debug:
        raise error
    kind = "" if isinstance(error, EXPECTED) else f"unexpected {type(error).__name__}, "
    _say(f"Error: {kind}{error} (--debug shows the traceback)")
    return 1


def _say(message: str) -> None:
    """Print a paragraph on the error stream, clear of a progress bar."""
    # Paths stay in one piece, to be copied.
    text = textwrap.fill(message, 88, break_long_words=False, break_on_hyphens=False)
    print(f"\n{text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
