"""Does every judge answer? An endpoint is asked what it serves and for one score with log-probabilities; of a judge in
this process, the checkpoint's files are read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from clincot.config import JudgeConfig, JudgeSpec, PreflightConfig
from clincot.errors import ModelFailed
from clincot.geometry import box_from_xyxy
from clincot.jsonl import hash_files, read_records
from clincot.judging.calibration import Calibration
from clincot.models.checkpoint import check_weight_files, check_weight_headers, hash_checkpoint
from clincot.models.endpoint import build_endpoint_judge
from clincot.preflight.preflight_report import PreflightCheck, fail_check, pass_check, skip_check
from clincot.preflight.probe import Probe
from clincot.prompts import Conversation, PromptFormat, judge_prompt
from clincot.records import Study

_IMAGE_SIDE = 224  # pixels of the picture that is sent


def build_judge_probes(config: PreflightConfig) -> list[Probe]:
    judge, limit_s = config.judge, config.timeout_s
    asked = [_build_judge_probe(spec, limit_s) for spec in judge.judges]
    tried = f"{len(judge.judges)} judges for a quorum of {judge.quorum}, and their calibration"
    mend = "fit it with `clincot calibrate`, or leave judge.calibration_file empty to use raw probabilities"
    return [Probe("panel", tried, mend, limit_s, lambda: _check_panel(judge, tried)), *asked]


def _build_judge_probe(spec: JudgeSpec, limit_s: float) -> Probe:
    name = f"judge {spec.name}"
    if spec.url:
        half = spec.model_copy(update={"timeout_s": min(spec.timeout_s, limit_s / 2)})  # two requests
        mend = "start the endpoint, or mend judge.judges: url (…/v1), model, api_key_env, timeout_s"
        return Probe(name, f"{spec.url}: what it serves", mend, limit_s, lambda: check_judge_endpoint(half, limit_s))
    mend = "name a folder with config.json and all of its *.safetensors in judge.judges"
    return Probe(name, f"{spec.path}: its files", mend, limit_s, lambda: check_judge_checkpoint(spec))


def check_judge_endpoint(spec: JudgeSpec, limit_s: float) -> Iterator[PreflightCheck]:
    """What it serves, and one score of a picture of our own. Raises ModelFailed, BadInput (no key)."""
    judge = build_endpoint_judge(spec)
    yield pass_check(f"judge {spec.name}: models", f"GET {judge.url}/models", f"serves {judge.model}")
    name = f"judge {spec.name}: score"
    how = "a rating n/10" if spec.rating else "log-probabilities"
    tried = f"POST {judge.url}/chat/completions with two pictures, for {how}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            (score,) = judge.p_yes([build_probe_conversation(Path(folder), judge.views)])
    except ModelFailed as error:
        yield fail_check(name, tried, str(error), _LOGPROBS_REMEDY)
        return
    if score is not None:
        yield pass_check(name, tried, f"{score:g}")
    elif spec.rating:
        yield fail_check(name, tried, "a reply that is no rating", "ask another model: this one does not write n/10")
    else:
        found = "log-probabilities, with yes and no together under a thousandth"
        yield fail_check(name, tried, found, "ask another model, or set `rating: true`: it answers neither yes nor no")


_LOGPROBS_REMEDY = (
    "serve the model with something that takes pictures and returns log-probabilities (vLLM does), or set "
    "`rating: true` for this judge"
)


def build_probe_conversation(folder: Path, views: PromptFormat) -> Conversation:
    """A grey picture, written to the folder, and the question that judges are asked about candidates."""
    path = folder / "grey.png"
    Image.new("RGB", (_IMAGE_SIDE, _IMAGE_SIDE), (96, 96, 96)).save(path)
    study = Study(image=path.name, sha256=hash_files(path), width=_IMAGE_SIDE, height=_IMAGE_SIDE)
    return judge_prompt(
        study, folder, views, question="Is the picture grey?", answer="yes", box=box_from_xyxy((0.25, 0.25, 0.75, 0.75))
    )


def check_judge_checkpoint(spec: JudgeSpec) -> Iterator[PreflightCheck]:
    """The folder's files: all there, safetensors alone, their headers whole, and the digest that records will carry."""
    name, folder = f"judge {spec.name}: checkpoint", Path(spec.checkpoint)
    if not folder.is_dir():
        from clincot.models.load import (
            check_checkpoint_exists,  # torch comes with it: seconds that a folder need not wait
        )

        check_checkpoint_exists(spec.checkpoint, what=f"judge {spec.name!r}")
        why = "a checkpoint of the hub's, whose weights come when it is loaded"
        yield skip_check(name, f"{spec.path}: config.json can be had; its weights", why)
        return
    digest = hash_checkpoint(folder)
    check_weight_files(folder)
    check_weight_headers(folder)
    yield pass_check(name, f"{folder}: its files, read whole", f"digest {digest[:12]}")


def _check_panel(config: JudgeConfig, tried: str) -> Iterator[PreflightCheck]:
    """Enough judges, each of a name of its own; and, where one is named, a calibration for those whose digest is known
    without asking."""
    names = [spec.name for spec in config.judges]
    if len(set(names)) < len(names) or len(names) < config.quorum:
        yield fail_check(
            "panel",
            tried,
            f"judges: {', '.join(names) or 'none'}",
            "name as many judges as judge.quorum asks for in judge.judges, each once",
        )
        return
    if config.calibration_path is None:
        yield pass_check("panel", tried, "raw probabilities (no judge.calibration_file)")
        return
    fitted = {one.judge for one in read_records(config.calibration_path, Calibration)}
    folders = [Path(spec.checkpoint) for spec in config.judges if spec.path and Path(spec.checkpoint).is_dir()]
    absent = [str(folder) for folder in folders if hash_checkpoint(folder) not in fitted]
    if absent:
        yield fail_check(
            "panel",
            tried,
            f"{config.calibration_file} has no calibration of {', '.join(absent)}",
            "fit it for this panel with `clincot calibrate`",
        )
        return
    yield pass_check("panel", tried, f"{config.calibration_file}: {len(fitted)} calibrations")
