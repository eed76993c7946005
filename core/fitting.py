"""`polyadapt DOMAIN fit|validate|test`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from lightning.pytorch.trainer.states import TrainerStatus

from .complaints import errors_in_one_line
from .configuration import Domain, DomainCLI, Verb
from .errors import AdaptError
from .run_folder import ADAPTER, refuse_to_replace, say_how_to_go_on, say_what_to_do_next
from .training import AdaptedModule


def run(domain: Domain, verb: str, argv: Sequence[str]) -> int:
    """Run a verb with its words; what the user did wrong is an `AdaptError`."""
    with calm(), errors_in_one_line():
        if verb == "fit":
            trained = fit(domain, argv)
            if trained.trainer.is_global_zero and (trained.folder / ADAPTER).is_file():
                _say_what_to_do_next(domain, trained)
        else:
            measure(domain, cast(Verb, verb), argv)
    return 0


def fit(domain: Domain, argv: Sequence[str]) -> DomainCLI:
    """Train; the run folder then holds the adapter file and what the run was."""
    cli = DomainCLI(domain, "fit", argv)
    if not (cli.config.overwrite or cli.config.trainer.fast_dev_run):
        refuse_to_replace(cli.folder, cli.config.ckpt_path)
    if cli.trainer.is_global_zero:
        print(str(cli.model.adapters).splitlines()[0], flush=True)
        if beside := _trained_beside(cli.model):
            print(f"head: {beside:,} trainable", flush=True)
    try:
        train(cli)
    except KeyboardInterrupt:
        say_how_to_go_on(domain.command("fit"), cli.folder)
        raise
    return cli


def _trained_beside(model: AdaptedModule) -> int:
    """What is trained and in no adapter: a decoder can be many times the set."""
    every = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return every - model.adapters.trainable_count()


def _say_what_to_do_next(domain: Domain, trained: DomainCLI) -> None:
    measure = domain.command("test" if "test" in domain.called else "validate")
    words = domain.next_words
    use = words if isinstance(words, str) else words(trained.model)
    say_what_to_do_next(trained.folder, measure, f"polyadapt {domain.name} {use}")


def train(cli: DomainCLI) -> None:
    """Lightning's fit; Ctrl-C stays a KeyboardInterrupt."""
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path)
    except SystemExit:
        if cli.trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        raise KeyboardInterrupt from None  # Lightning has turned it into exit code 1


def measure(
    domain: Domain, verb: Verb, argv: Sequence[str], verbose: bool = True
) -> dict[str, float]:
    """Validate or test an adapter file or a checkpoint; the metrics by name."""
    cli = DomainCLI(domain, verb, argv)
    if (cli.set_file is None) == (cli.config.ckpt_path is None):
        raise AdaptError(
            f"{domain.called[verb]} needs what to measure: either --set FILE or --ckpt_path FILE"
        )
    ask = cli.trainer.validate if verb == "validate" else cli.trainer.test
    checkpoint = cli.config.ckpt_path
    found = ask(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, verbose=verbose)
    if not found:
        raise AdaptError("there is no validation part: add one, or set val_share above 0")
    return dict(found[0])


@contextmanager
def calm() -> Iterator[None]:
    """Without Lightning's greetings; a warning is one line."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels, form = [log.level for log in loggers], warnings.formatwarning
    try:
        with warnings.catch_warnings():
            # Asked for: samples are prepared in between the steps unless num_workers is set.
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            # Meant: without a validation part there is none.
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero.*")
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
            warnings.formatwarning = lambda message, *_: f"polyadapt: note: {message}\n"
            for log in loggers:
                log.setLevel(logging.WARNING)
            yield
    finally:
        warnings.formatwarning = form
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
