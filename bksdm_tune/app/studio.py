"""All that the app can do, for its views and for its named endpoints alike."""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
from pathlib import Path

from bksdm_tune.app import uploads
from bksdm_tune.app.drawing import Drawing, check_here
from bksdm_tune.app.forms import Form
from bksdm_tune.app.jobs import CANCELLED, PAUSED, Job, Jobs
from bksdm_tune.app.library import PHOTOS, Library, check_title
from bksdm_tune.errors import DataError, UsageError

EXPORTS = ".exports"
LONGEST_ESTIMATE, LONGEST_SCORING = 900, 6 * 3600  # seconds


class Studio:
    """A library, its queue of trainings, and what draws."""

    def __init__(self, library: Path) -> None:
        self.library = Library(library)
        self.drawing = Drawing(self.library)
        self.jobs = Jobs(library, self.drawing.release)

    # Training

    def examine(self, photos: list[Path], form: Form | None = None) -> list[uploads.Verdict]:
        """A verdict on each photo; ``form`` says how large they must be."""
        return uploads.examine(photos, (form.pixels if form else 64) // 2)

    def estimate(self, form: Form, photos: list[Path]) -> str:
        """What two measured steps say of time, memory and disk, in a process of its own."""
        scratch = self.library.root / f".estimate-{uuid.uuid4().hex}"
        try:
            kept = uploads.keep(self.examine(photos, form), scratch / "photos")
            words = [*form.words(kept, scratch / "run"), "--dry-run"]
            said = self._run(words, LONGEST_ESTIMATE).splitlines()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return next(line for line in said if line.startswith("Dry run: ")).partition(" Nothing")[0]

    def _run(self, words: list[str], longest: float) -> str:
        """What a command prints, run in a process of its own.

        Raises:
            DataError: it failed, or took more than ``longest`` seconds.
        """
        try:
            done = subprocess.run(
                [sys.executable, "-m", "bksdm_tune", *words],
                capture_output=True, text=True, timeout=longest,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DataError(f"That took more than {longest:.0f} s here; it was ended.") from None
        if done.returncode:
            raise DataError(_last_complaint(done.stderr.splitlines()))
        return done.stdout

    def command(self, form: Form) -> str:
        """The exact command line, with the folders it would have now."""
        return self._job(form, None).command

    def train(self, form: Form, photos: list[Path], owner: str | None = None) -> Job:
        """Put a training into the queue.

        Raises:
            UsageError: too few photos can be used, or the queue is full.
        """
        verdicts = self.examine(photos, form)
        with self.library.lock:
            self.jobs.check_room()
            job = self._job(form, owner)
            photos_ = self.photos_of(job.run)
            try:
                uploads.keep(verdicts, photos_)
                job.run.mkdir()  # so that the name is taken
                self.library.name(job.run.name, form.title)
                return self.jobs.add(job)
            except BaseException:
                shutil.rmtree(photos_, ignore_errors=True)
                shutil.rmtree(job.run, ignore_errors=True)
                raise

    def _job(self, form: Form, owner: str | None) -> Job:
        run = self.library.free_folder(form.title)
        words = form.words(self.photos_of(run), run)
        return Job(form.title, words, run, form.length, owner)

    def photos_of(self, run: Path) -> Path:
        return self.library.root / PHOTOS / run.name

    def mine(self, owner: str | None) -> list[Job]:
        """The jobs that ``owner`` may see, the newest first; those of nobody are everybody's."""
        return [job for job in reversed(self.jobs.all()) if job.owner in (None, owner)]

    def my_job(self, name: str, owner: str | None) -> Job:
        """
        Raises:
            UsageError: there is none, or it is somebody else's.
        """
        job = self.jobs.get(name)
        if job.owner not in (None, owner):
            raise UsageError("There is no such job.")
        return job

    def act(self, name: str, act: str, owner: str | None = None) -> None:
        """Pause, cancel, resume or forget a job.

        Raises:
            UsageError: there is no such act or job, or it is somebody else's.
        """
        job = self.my_job(name, owner)
        acts = {
            "pause": lambda: self.jobs.end(job.id, PAUSED),
            "cancel": lambda: self.jobs.end(job.id, CANCELLED),
            "resume": lambda: self.jobs.resume(job.id),
            "forget": lambda: self._forget(job),
        }
        if act not in acts:
            raise UsageError(f"A job can be told to {', '.join(acts)}.")
        acts[act]()

    def _forget(self, job: Job) -> None:
        """The folder of a job that never finished goes too."""
        with self.library.lock:
            self.jobs.forget(job.id)
            self.library.sweep(job.run, self.photos_of(job.run))

    # Library

    def delete(self, name: str) -> None:
        """A model, the photos it was taught with, and its title."""
        with self.library.lock:
            run = self.library.get(name).folder
            self.library.delete(name)
            shutil.rmtree(self.photos_of(run), ignore_errors=True)
            for job in self.jobs.all():
                if job.run == run:
                    self.jobs.forget(job.id)

    def score(self, name: str) -> None:
        """Score a model over its prompts, into its folder."""
        from bksdm_tune.app.contest import protocol_here

        folder = self.library.get(name).folder
        self._run(["score", str(folder), "--protocol", protocol_here()], LONGEST_SCORING)

    def import_adapter(self, path: Path, title: str, backbone: str, trigger: str) -> str:
        """Put an adapter file of any tool into the library; its slug.

        Raises:
            UsageError, DataError: it is no adapter, or is for another architecture.
        """
        from bksdm_tune.app.exchange import import_adapter

        check_title(title)
        check_here(backbone)
        with self.library.lock:
            folder = self.library.free_folder(title)
            import_adapter(path, folder, backbone, trigger)
            self.library.name(folder.name, title)
        return folder.name

    def export(self, name: str, format: str, dtype: str = "fp16") -> tuple[Path, str]:
        """A file to take home, and what is to be said of it."""
        from bksdm_tune.app.exchange import export_model

        return export_model(self.library.root / EXPORTS, self.library.get(name), format, dtype)


def _last_complaint(lines: list[str]) -> str:
    start = next(
        (i for i, x in reversed(list(enumerate(lines))) if x.startswith("bksdm-tune: ")), -1
    )
    return "\n".join(lines[start:]).removeprefix("bksdm-tune: ") or "It ended without a word."
