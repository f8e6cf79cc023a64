"""The demo's end: the champion published, rolled out between processes of this machine, and asked a question.

Every line that is told with a `$` was run just so. What ran is stopped again, also after an error or Ctrl-C; what a
killed demo left running is stopped by the next one, which goes on with what is published already.
"""

from __future__ import annotations

import base64
import json
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clincot.config import PublishConfig
from clincot.deployment.deployment import abandon_rollout
from clincot.deployment.journal import read_last_journal
from clincot.deployment.targets.local import SERVE_COMMAND, LocalTarget, ServerProcess, stop_all_servers
from clincot.errors import UserError, require_extra
from clincot.jsonl import write_json
from clincot.registry import champion
from clincot.registry.golden import publish_checkpoint
from clincot.registry.manifest import GoldenQuestion, Manifest, build_checkpoint_key, read_manifest
from clincot.rounds import Plan
from clincot.runs.layout import BENCHMARK_REPORT_FILE, DECISION_FILE, PANEL_REPORT_FILE
from clincot.serving.reference_answers import answer_as_served
from clincot.storage.folder_store import FolderStore

MODEL_NAME = "demo"
DEFAULT_PORT = 8080  # of the address, where it is free
ANSWER_TIMEOUT_S = 60.0


class DemoEndpointFailed(UserError, RuntimeError):
    """A line that the demo tells did not do what it should; quotes it."""


@dataclass(frozen=True)
class EndpointTranscript:
    """What was tried: command lines and what came back."""

    serve: str  # a server of the champion, as the rollout started it
    deploy: str  # the rollout
    ask: str  # a question to the address
    answer: dict[str, Any]  # the completion's extension `clincot`
    question: str
    stop: str

    def render_text(self) -> str:
        chain = self.answer
        seen, looked = chain["regions"][chain["winner"]], len(chain["regions"])
        box = ", ".join(f"{100 * seen['box'][side]:.0f}" for side in ("x0", "y0", "x1", "y1"))
        return (
            "an endpoint (all of this was run just now, and is stopped again)\n"
            f"  the server alone (asked at its own port, it said the same)\n    $ {self.serve}\n"
            "  or rolled out: published, checked by its golden questions, behind an address that stays\n"
            f"    $ {self.deploy}\n"
            f"  {self.question}\n    $ {self.ask}\n"
            f"    {chain['answer']}   (confidence {chain['confidence']:.2f}; of {looked} regions it was seen best at "
            f"[{box}] percent)\n"
            f"  stop it\n    $ {self.stop}"
        )


def check_serving() -> None:
    """Raise BadInput where what serving needs is not installed: said before the rounds, not after them."""
    with require_extra("serve", "the demo ends in an endpoint, which"):
        import kserve  # noqa: F401
        import uvicorn  # noqa: F401


def run_endpoint_demo(plan: Plan) -> EndpointTranscript:
    """Publish the base and what the rounds promoted, roll out whoever is champion, ask, and stop.

    Raises EndpointFailed, and what publishing raises.
    """
    store, state = FolderStore(plan.run / "store"), plan.run / "serving"
    stop_all_servers(state)
    line = [_publish_round(plan, store, number) for number in (0, *_list_promoted_rounds(plan))]
    _start_champion(store, line[0])
    _abandon_open_rollout(store, state)
    now, digests = champion.read_champion(store, MODEL_NAME).now.sha256, [one.sha256 for one in line]
    if now not in digests:
        raise DemoEndpointFailed(
            f"{store.url}: the champion is {now[:12]}, which this run neither began with nor promoted; remove it"
        )
    port = _find_free_port()
    try:
        deploy = ""
        for manifest in line[digests.index(now) :]:
            which = [] if manifest.sha256 == now else ["--checkpoint", manifest.sha256[:12]]
            deploy = _run_command(
                _build_command(
                    "deploy",
                    "--target",
                    "local",
                    "--store",
                    str(plan.run / "store"),
                    "--name",
                    MODEL_NAME,
                    *which,
                    "--state",
                    str(state),
                    "--port",
                    str(port),
                    "--set",
                    "deploy.step_s=0",
                    "--set",
                    "deploy.smoke_misses=1",  # a small policy's near ties between windows may fall otherwise
                )
            )[0]
        manifest = line[-1]
        golden = manifest.golden[0]
        image = plan.run / "store" / build_checkpoint_key(MODEL_NAME, manifest.sha256) / golden.image
        write_json(plan.run / "question.json", _build_request(manifest, golden, image))
        served = ServerProcess.model_validate_json((state / "servers" / f"{manifest.sha256}.json").read_bytes())
        answer = _ask_endpoint(served.url, plan.run / "question.json")[1]
        ask, through = _ask_endpoint(f"http://127.0.0.1:{port}", plan.run / "question.json")
        for came in (answer, through):
            if came["answer"] != golden.answer:
                raise DemoEndpointFailed(f"{ask}: expected the golden answer {golden.answer!r}, got {came['answer']!r}")
        stop = _run_command(_build_command("deploy", "--stop", "--state", str(state)))[0]
    finally:
        stop_all_servers(state)
    folder = _shorten_path(state.absolute() / "checkpoints" / MODEL_NAME / manifest.sha256)
    python, *words = (word.format(checkpoint=folder, port=served.url.rpartition(":")[2]) for word in SERVE_COMMAND)
    serve = shlex.join([_shorten_path(Path(python)), *words])
    return EndpointTranscript(serve, deploy, ask, through, golden.question, stop)


def _list_promoted_rounds(plan: Plan) -> list[int]:
    """The rounds whose challengers were promoted, in their order."""
    content = json.loads((plan.run / "champion.json").read_text(encoding="utf-8"))
    return [int(one["round"]) for one in content["promotions"]]


def _publish_round(plan: Plan, store: FolderStore, number: int) -> Manifest:
    """The base (0), or a promoted round's policy with the evidence for it; the same again changes nothing."""
    config = PublishConfig(store=str(store.root), name=MODEL_NAME, round=number)
    if number == 0:
        base = {
            "checkpoint": plan.policy,
            "report": plan.run / "base" / BENCHMARK_REPORT_FILE,
            "golden": plan.benchmark,
        }
        return publish_checkpoint(config, base, load_look=answer_as_served)
    folder = plan.run / f"round-{number:02d}"
    return publish_checkpoint(
        config,
        {
            "checkpoint": folder / "policy",
            "report": folder / BENCHMARK_REPORT_FILE,
            "decision": folder / DECISION_FILE,
            "panel_report": folder / PANEL_REPORT_FILE,
            "golden": plan.benchmark,
        },
        load_look=answer_as_served,
    )


def _start_champion(store: FolderStore, base: Manifest) -> None:
    """The base is the line's round-0 champion, unless the line has moved on."""
    try:
        champion.read_champion(store, MODEL_NAME)
    except champion.NoChampion:
        champion.create_champion_pointer(store, base, by="demo")


def _abandon_open_rollout(store: FolderStore, state: Path) -> None:
    """A rollout that an interrupted demo left open."""
    journal = read_last_journal(store, MODEL_NAME, by="demo")
    if journal is None or journal.ended:
        return
    manifest = read_manifest(store, MODEL_NAME, journal.plan.sha256)
    abandon_rollout(
        journal, LocalTarget(state, store, manifest, journal.plan.settings.steps), "the demo was interrupted"
    )


def _build_command(*args: str) -> list[str]:
    """The command as a user has it, beside the interpreter that runs the demo."""
    script = Path(sys.executable).with_name("clincot")
    return (
        [_shorten_path(script), *args]
        if script.is_file()
        else [_shorten_path(Path(sys.executable)), "-m", "clincot.cli.app", *args]
    )


def _shorten_path(path: Path) -> str:
    """As one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _run_command(command: list[str]) -> tuple[str, str]:
    """Run a command as told; returns the line and what it printed."""
    line = shlex.join(command)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DemoEndpointFailed(f"{line}: ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}")
    return line, done.stdout


def _ask_endpoint(url: str, request: Path) -> tuple[str, dict[str, Any]]:
    """The line, and the chain that came back."""
    if shutil.which("curl") is None:
        raise DemoEndpointFailed("curl is not installed, and the demo asks its endpoint with it: apt-get install curl")
    line, said = _run_command(
        [
            "curl",
            "--silent",
            "--show-error",
            "--fail-with-body",
            "--max-time",
            f"{ANSWER_TIMEOUT_S:.0f}",
            "-H",
            "Content-Type: application/json",
            "-d",
            f"@{request}",
            f"{url}/openai/v1/chat/completions",
        ]
    )
    chain: dict[str, Any] = json.loads(said)["clincot"]
    return line, chain


def _build_request(manifest: Manifest, golden: GoldenQuestion, image: Path) -> dict[str, Any]:
    """A chat completion's request, as any client of OpenAI's protocol sends it. A server's model is its checkpoint."""
    kind = "jpeg" if image.suffix in (".jpg", ".jpeg") else "png"
    uri = f"data:image/{kind};base64," + base64.b64encode(image.read_bytes()).decode("ascii")
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": golden.question}]
    return {"model": manifest.sha256, "messages": [{"role": "user", "content": parts}]}


def _find_free_port() -> int:
    """PORT, or a free one where something listens there."""
    for port in (DEFAULT_PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoEndpointFailed("no port of 127.0.0.1 is free")
