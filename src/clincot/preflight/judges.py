"""Checks of the judges: endpoints have to serve and score, local checkpoints have to be complete.

An endpoint is asked for its models and for one score with log-probabilities. The files of a judge that will run in this
process are verified, and then it is examined like by `clincot doctor`.
"""

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
from clincot.models.checkpoint import (
    check_no_adapter,
    check_weight_files,
    check_weight_headers,
    hash_checkpoint,
)
from clincot.models.endpoint import build_endpoint_judge
from clincot.preflight.preflight_report import PreflightCheck, fail_check, pass_check, skip_check
from clincot.preflight.probe import Probe
from clincot.prompts import Conversation, PromptFormat, judge_prompt
from clincot.records import Study

_IMAGE_SIDE = 224  # pixels of the probe image


def build_judge_probes(config: PreflightConfig) -> list[Probe]:
    """Build the probe of the panel and one probe for each judge."""
    judge, limit_s = config.judge, config.timeout_s
    judge_probes = [_build_judge_probe(spec, config) for spec in judge.judges]
    description = f"{len(judge.judges)} judges for a quorum of {judge.quorum}, and their calibration"
    remedy = "fit it with `clincot calibrate`, or leave judge.calibration_file empty to use raw probabilities"
    return [Probe("panel", description, remedy, limit_s, lambda: _check_panel(judge, description)), *judge_probes]


def _build_judge_probe(spec: JudgeSpec, config: PreflightConfig) -> Probe:
    name, limit_s = f"judge {spec.name}", config.timeout_s
    if spec.url:
        half = spec.model_copy(update={"timeout_s": min(spec.timeout_s, limit_s / 2)})  # the check sends two requests
        remedy = "start the endpoint, or correct judge.judges: url (…/v1), model, api_key_env, timeout_s"
        return Probe(name, f"{spec.url}: served models", remedy, limit_s, lambda: check_judge_endpoint(half))
    remedy = "name a folder with config.json and all of its *.safetensors in judge.judges"
    return Probe(name, f"{spec.path}: its files", remedy, config.verify_s, lambda: check_judge_checkpoint(spec))


def check_judge_endpoint(spec: JudgeSpec) -> Iterator[PreflightCheck]:
    """Check an endpoint's served model and its score of a grey test image.

    Raises ModelFailed if the endpoint does not list its models, InvalidInput if the API key is unset.
    """
    judge = build_endpoint_judge(spec)
    yield pass_check(f"judge {spec.name}: models", f"GET {judge.url}/models", f"serves {judge.model}")
    name = f"judge {spec.name}: score"
    kind = "a rating n/10" if spec.rating else "log-probabilities"
    probe = f"POST {judge.url}/chat/completions with two images, for {kind}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            (score,) = judge.p_yes([build_probe_conversation(Path(folder), judge.views)])
    except ModelFailed as error:
        yield fail_check(name, probe, str(error), _LOGPROBS_REMEDY)
        return
    if score is not None:
        yield pass_check(name, probe, f"{score:g}")
    elif spec.rating:
        yield fail_check(name, probe, "a reply without a rating", "use another model: this one does not write n/10")
    else:
        result = "log-probabilities, with yes and no together under a thousandth"
        remedy = "use another model, or set `rating: true`: this one answers neither yes nor no"
        yield fail_check(name, probe, result, remedy)


_LOGPROBS_REMEDY = (
    "serve the model with a server that accepts images and returns log-probabilities (vLLM does), or set "
    "`rating: true` for this judge"
)


def build_probe_conversation(folder: Path, views: PromptFormat) -> Conversation:
    """Build a judge's prompt about a grey image, which is written to the folder."""
    path = folder / "grey.png"
    Image.new("RGB", (_IMAGE_SIDE, _IMAGE_SIDE), (96, 96, 96)).save(path)
    study = Study(image=path.name, sha256=hash_files(path), width=_IMAGE_SIDE, height=_IMAGE_SIDE)
    return judge_prompt(
        study, folder, views, question="Is the picture grey?", answer="yes", box=box_from_xyxy((0.25, 0.25, 0.75, 0.75))
    )


def check_judge_checkpoint(spec: JudgeSpec) -> Iterator[PreflightCheck]:
    """Check that a checkpoint folder is complete and can work as a judge (preflight.doctor).

    For a name on the hub only config.json is checked. Raises InvalidInput if a file is missing or malformed.
    """
    name, folder = f"judge {spec.name}: checkpoint", Path(spec.checkpoint)
    if not folder.is_dir():
        from clincot.models.load import check_checkpoint_exists  # imports torch, which takes seconds

        check_checkpoint_exists(spec.checkpoint, what=f"judge {spec.name!r}")
        reason = "config.json is available; the hub's weights are downloaded when the judge is loaded"
        yield skip_check(name, f"{spec.path}: config.json and weights", reason)
        return
    check_no_adapter(folder)
    check_weight_files(folder)
    digest = hash_checkpoint(folder)
    check_weight_headers(folder)
    yield pass_check(name, f"{folder}: all files read", f"digest {digest[:12]}")
    from clincot.preflight.doctor import DoctorOptions, examine_in_preflight  # imports torch

    options = DoctorOptions(role="text-judge" if spec.text_only else "judge", thinking=spec.thinking != "off")
    yield from examine_in_preflight(f"judge {spec.name}", folder, options)


def _check_panel(config: JudgeConfig, probe: str) -> Iterator[PreflightCheck]:
    """Check that enough judges have distinct names and that those in local folders are calibrated.

    The digest of a judge behind an endpoint is unknown before it is asked, so its calibration cannot be checked here.
    """
    names = [spec.name for spec in config.judges]
    if len(set(names)) < len(names) or len(names) < config.quorum:
        result = f"judges: {', '.join(names) or 'none'}"
        remedy = f"name at least {config.quorum} judges (judge.quorum) in judge.judges, each with a name of its own"
        yield fail_check("panel", probe, result, remedy)
        return
    if config.calibration_path is None:
        yield pass_check("panel", probe, "raw probabilities (no judge.calibration_file)")
        return
    calibrated = {calibration.judge for calibration in read_records(config.calibration_path, Calibration)}
    folders = [Path(spec.checkpoint) for spec in config.judges if spec.path and Path(spec.checkpoint).is_dir()]
    absent = [str(folder) for folder in folders if hash_checkpoint(folder) not in calibrated]
    if absent:
        result = f"{config.calibration_file} has no calibration of {', '.join(absent)}"
        yield fail_check("panel", probe, result, "fit it for this panel with `clincot calibrate`")
        return
    yield pass_check("panel", probe, f"{config.calibration_file}: {len(calibrated)} calibrations")
