"""Does every judge answer? An endpoint is asked what it serves and for one score with log-probabilities; of a judge in
this process, the checkpoint's files are read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from clincot.config import JudgeSection, JudgeSpec, PreflightSection
from clincot.errors import ModelFailed
from clincot.geometry import box_of
from clincot.jsonl import file_digest, read_records
from clincot.judging.calibration import Calibration
from clincot.models.checkpoint import check_headers, check_whole, checkpoint_digest
from clincot.models.endpoint import endpoint_judge
from clincot.preflight.preflight_report import Check, failed, passed, skipped
from clincot.preflight.probe import Probe
from clincot.prompts import Conversation, Views, judgement
from clincot.records import Study

_SIDE = 224  # pixels of the picture that is sent


def probes(section: PreflightSection) -> list[Probe]:
    judge, limit_s = section.judge, section.timeout_s
    asked = [_probe(spec, limit_s) for spec in judge.judges]
    tried = f"{len(judge.judges)} judges for a quorum of {judge.quorum}, and their calibration"
    mend = "fit it with `clincot calibrate`, or leave judge.calibration_file empty to use raw probabilities"
    return [Probe("panel", tried, mend, limit_s, lambda: _panel(judge, tried)), *asked]


def _probe(spec: JudgeSpec, limit_s: float) -> Probe:
    name = f"judge {spec.name}"
    if spec.url:
        half = spec.model_copy(update={"timeout_s": min(spec.timeout_s, limit_s / 2)})  # two requests
        mend = "start the endpoint, or mend judge.judges: url (…/v1), model, api_key_env, timeout_s"
        return Probe(name, f"{spec.url}: what it serves", mend, limit_s, lambda: endpoint(half, limit_s))
    mend = "name a folder with config.json and all of its *.safetensors in judge.judges"
    return Probe(name, f"{spec.path}: its files", mend, limit_s, lambda: checkpoint(spec))


def endpoint(spec: JudgeSpec, limit_s: float) -> Iterator[Check]:
    """What it serves, and one score of a picture of our own. Raises ModelFailed, BadInput (no key)."""
    judge = endpoint_judge(spec)
    yield passed(f"judge {spec.name}: models", f"GET {judge.url}/models", f"serves {judge.model}")
    name = f"judge {spec.name}: score"
    how = "a rating n/10" if spec.rating else "log-probabilities"
    tried = f"POST {judge.url}/chat/completions with two pictures, for {how}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            (score,) = judge.p_yes([probe_conversation(Path(folder), judge.views)])
    except ModelFailed as error:
        yield failed(name, tried, str(error), _LOGPROBS)
        return
    if score is not None:
        yield passed(name, tried, f"{score:g}")
    elif spec.rating:
        yield failed(name, tried, "a reply that is no rating", "ask another model: this one does not write n/10")
    else:
        found = "log-probabilities, with yes and no together under a thousandth"
        yield failed(name, tried, found, "ask another model, or set `rating: true`: it answers neither yes nor no")


_LOGPROBS = (
    "serve the model with something that takes pictures and returns log-probabilities (vLLM does), or set "
    "`rating: true` for this judge"
)


def probe_conversation(folder: Path, views: Views) -> Conversation:
    """A grey picture, written to the folder, and the question that judges are asked about candidates."""
    path = folder / "grey.png"
    Image.new("RGB", (_SIDE, _SIDE), (96, 96, 96)).save(path)
    study = Study(image=path.name, sha256=file_digest(path), width=_SIDE, height=_SIDE)
    return judgement(
        study, folder, views, question="Is the picture grey?", answer="yes", box=box_of((0.25, 0.25, 0.75, 0.75))
    )


def checkpoint(spec: JudgeSpec) -> Iterator[Check]:
    """The folder's files: all there, safetensors alone, their headers whole, and the digest that records will carry."""
    name, folder = f"judge {spec.name}: checkpoint", Path(spec.path)
    if not folder.is_dir():
        from clincot.models.load import check_checkpoint  # torch comes with it: seconds that a folder need not wait

        check_checkpoint(spec.path, what=f"judge {spec.name!r}")
        why = "a checkpoint of the hub's, whose weights come when it is loaded"
        yield skipped(name, f"{spec.path}: config.json can be had; its weights", why)
        return
    digest = checkpoint_digest(folder)
    check_whole(folder)
    check_headers(folder)
    yield passed(name, f"{folder}: its files, read whole", f"digest {digest[:12]}")


def _panel(section: JudgeSection, tried: str) -> Iterator[Check]:
    """Enough judges, each of a name of its own; and, where one is named, a calibration for those whose digest is known
    without asking."""
    names = [spec.name for spec in section.judges]
    if len(set(names)) < len(names) or len(names) < section.quorum:
        yield failed(
            "panel",
            tried,
            f"judges: {', '.join(names) or 'none'}",
            "name as many judges as judge.quorum asks for in judge.judges, each once",
        )
        return
    if not section.calibration_file:
        yield passed("panel", tried, "raw probabilities (no judge.calibration_file)")
        return
    fitted = {one.judge for one in read_records(Path(section.calibration_file), Calibration)}
    folders = [Path(spec.path) for spec in section.judges if spec.path and Path(spec.path).is_dir()]
    absent = [str(folder) for folder in folders if checkpoint_digest(folder) not in fitted]
    if absent:
        yield failed(
            "panel",
            tried,
            f"{section.calibration_file} has no calibration of {', '.join(absent)}",
            "fit it for this panel with `clincot calibrate`",
        )
        return
    yield passed("panel", tried, f"{section.calibration_file}: {len(fitted)} calibrations")
