"""`polyadapt vision segment`: masks of pictures and scans by an adapter file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.cli import OneLineParser
from ..core.errors import AdaptError, StoreError

if TYPE_CHECKING:
    from .medical.describe import Description, Segmenter
    from .medical.jobs import Job
    from .medical.prompts import Places
    from .medical.results import Results, Row
    from .medical.segmenting import Manner, Mask, Seen

_PATIENCE = 10.0  # seconds between two lines of progress where lines cannot be overwritten


def main(argv: list[str]) -> int:
    """Write a mask for each picture that `argv` names; each is told on stdout when it is there."""
    asked = _parser().parse_args(argv)
    if asked.window and (asked.boxes or asked.points):
        raise AdaptError("--window sees one part after another: leave out --boxes and --points")
    if asked.levels is not None and not asked.levels[0] < asked.levels[1]:
        low, high = asked.levels
        raise AdaptError(f"--levels {low:g} {high:g} is not allowed: low, then high")
    from .medical.prompts import Places
    from .medical.results import Results

    places = Places.read(asked.boxes, asked.points)
    jobs = _jobs(asked)
    segmenter = _segmenter(asked.set)
    manner = _manner(asked, places, segmenter.about)
    return _segment(segmenter, jobs, manner, Results(asked.out, asked.overlays))


def _manner(asked: argparse.Namespace, places: Places | None, about: Description) -> Manner:
    """What is not asked for is as it was in training; that is told."""
    from .medical.segmenting import Manner

    window, levels, told = asked.window, about.levels, []
    if window is None and about.crop is not None and places is None:
        window = about.crop
        told.append(f"--window {window}")
    if asked.levels is not None:
        levels = asked.levels[0], asked.levels[1]
    elif levels is not None:
        told.append(f"--levels {levels[0]:g} {levels[1]:g}")
    if told:
        print(f"polyadapt: as in training: {' '.join(told)}", file=sys.stderr)
    return Manner(
        threshold=asked.threshold,
        window=window or None,
        batch=asked.batch,
        levels=levels,
        places=places,
        labels=tuple(asked.labels),
    )


def _jobs(asked: argparse.Namespace) -> list[Job]:
    """What is to be segmented, when nothing that is read would be overwritten."""
    from .medical.jobs import jobs_of, refuse_overwriting, with_truths
    from .medical.results import TABLE, overlay_file

    jobs = jobs_of(asked.images, asked.out)
    if asked.masks is not None:
        jobs = with_truths(jobs, asked.masks, asked.mask_suffix)
    written = [asked.out / TABLE, *(job.mask for job in jobs)]
    if asked.overlays is not None:
        if asked.overlays.resolve() == asked.out.resolve():
            raise AdaptError(
                f"--overlays {asked.overlays} is --out: masks and overlays have one name"
            )
        written += [overlay_file(asked.overlays, job, None) for job in jobs]
    files = [file for job in jobs for file in (job.file, job.truth) if file is not None]
    tables = [Path(word) for word in (*asked.boxes, *asked.points)]
    inputs = [asked.set, *tables, *(f.top / f.name for f in files)]
    refuse_overwriting(written, inputs, asked.out / TABLE)
    return jobs


def _segmenter(path: Path) -> Segmenter:
    import torch

    from .medical.describe import Segmenter

    return Segmenter(path, "cuda" if torch.cuda.is_available() else "cpu")


def _segment(segmenter: Segmenter, jobs: Sequence[Job], manner: Manner, results: Results) -> int:
    """The exit code: 2 when a file was left out, 130 when it was interrupted."""
    from .medical.segmenting import Failed, segment_all

    progress = _Progress(jobs)
    failed: list[AdaptError] = []
    code = 0
    try:
        view = segmenter.about.view
        for found in segment_all(segmenter.logits, view, jobs, manner, progress.show):
            if isinstance(found, Failed):
                failed.append(found.error)
            else:
                _take(*found, results, failed, progress)
            del found  # before the next large picture is read
    except KeyboardInterrupt:
        code = 130
    progress.clear()
    return _end(results, jobs, failed, code)


def _take(
    seen: Seen, mask: Mask, results: Results, failed: list[AdaptError], progress: _Progress
) -> None:
    progress.show(seen.job, (seen.layer + 1) / seen.layers)
    try:
        rows = results.take(seen, mask)
    except StoreError:
        raise  # what cannot be written now cannot be written for the next file
    except AdaptError as error:
        failed.append(error)
        return
    if rows:
        progress.clear()
        print(_line(seen.job, rows), flush=True)


def _end(results: Results, jobs: Sequence[Job], failed: Sequence[AdaptError], code: int) -> int:
    if results.rows:
        results.write_table()
    if code:
        done = len({row.image for row in results.rows})
        print(f"polyadapt: interrupted: {done} of {len(jobs)} files are done", file=sys.stderr)
    for error in failed:
        print(f"polyadapt: not segmented: {error}", file=sys.stderr)
    if said := results.summary():
        print(said)
    return code or (2 if failed else 0)


def _line(job: Job, rows: Sequence[Row]) -> str:
    """The mask's file and how much it marks, of a volume in all slices together."""
    marked, all_ = sum(row.pixels for row in rows), sum(row.height * row.width for row in rows)
    return f"{job.mask}\t{marked} px\t{marked / all_:.2%}"


class _Progress:
    """How far the files are, on stderr."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.numbers = {job: number for number, job in enumerate(jobs, start=1)}
        self.live = sys.stderr.isatty()
        self.last = time.monotonic()
        self.shown = False

    def show(self, job: Job, share: float) -> None:
        if not self.live and time.monotonic() - self.last < _PATIENCE:
            return
        self.last = time.monotonic()
        number = f"{self.numbers[job]} of {len(self.numbers)}"
        line = f"{number}: {job.file.name}, {share:.0%}"
        print(
            f"\r\x1b[K{line}" if self.live else line,
            end="" if self.live else "\n",
            file=sys.stderr,
            flush=True,
        )
        self.shown = self.live

    def clear(self) -> None:
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown = False


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt vision segment",
        description="Write masks of pictures and scans with an adapter file of a Segment Anything"
        " model: PNG for photographs, NIfTI and DICOM for themselves, each at its own size.",
        epilog="Ctrl-C keeps the masks that are whole.",
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="files, folders, .zip files or patterns")
    add("--set", type=Path, required=True, metavar="FILE", help="the adapter file")
    add("--out", type=Path, required=True, metavar="FOLDER", help="masks and areas.csv go there")
    add("--overlays", type=Path, metavar="FOLDER", help="also pictures with their masks on them")
    add("--threshold", type=_share, default=0.5, metavar="P", help="probability; default: 0.5")
    window = "see pictures through windows of N x N of their own pixels, 0: as a whole"
    add("--window", type=_whole, metavar="N", help=f"{window}; default: as in training")
    wanted = "or a .csv with columns image and these; in pixels of the pictures"
    add("--boxes", nargs="+", default=[], metavar="X0,Y0,X1,Y1", help=wanted)
    add("--points", nargs="+", default=[], metavar="X,Y[,LABEL]", help=f"label 1 or 0; {wanted}")
    levels = (
        "what is black and white in deep pictures, such as -100 300 HU; default: as in training"
    )
    add("--levels", nargs=2, type=float, metavar=("LOW", "HIGH"), help=levels)
    add("--masks", type=Path, metavar="FOLDER", help="true masks: scores go into the table")
    add("--mask-suffix", default="", metavar="TEXT", help="behind NAME in the names of true masks")
    labels = "values of true masks that count, where they mark several structures"
    add("--labels", nargs="+", type=_whole, default=[], metavar="VALUE", help=labels)
    add("--batch", type=_positive, default=4, metavar="N", help="squares at once; default: 4")
    return parser


def _whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
    return int(text)


def _positive(text: str) -> int:
    return _whole(text, least=1)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")
    return share
