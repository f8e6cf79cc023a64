"""The end of the demo: publish the champion, roll it out between local processes, and ask it a question.

Every line printed with a `$` was run exactly so. All processes are stopped at the end, also after an error or Ctrl-C.
If the demo was killed, the next one stops what it left running and continues with what is published already.
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

from clincot.config import PublishConfig, resolve_path
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
DEFAULT_PORT = 8080  # another one is used if it is taken
ANSWER_TIMEOUT_S = 60.0


class DemoEndpointFailed(UserError, RuntimeError):
    """A command of the demo failed or returned something unexpected; the message quotes it."""


@dataclass(frozen=True)
class EndpointTranscript:
    """The commands that were run, and the answer that came back."""

    serve: str  # command of the champion's server, as the rollout started it
    deploy: str  # command of the rollout
    ask: str  # command that asks the endpoint a question
    answer: dict[str, Any]  # extension `clincot` of the completion
    question: str
    stop: str

    def render_text(self) -> str:
        chain = self.answer
        winner, total = chain["regions"][chain["winner"]], len(chain["regions"])
        box = ", ".join(f"{100 * winner['box'][side]:.0f}" for side in ("x0", "y0", "x1", "y1"))
        return (
            "an endpoint (all of this has just been run and is stopped again)\n"
            f"  start only the server (asked at its own port, it gave the same answer)\n    $ {self.serve}\n"
            "  or roll it out: published, checked by its golden questions, behind an address that does not change\n"
            f"    $ {self.deploy}\n"
            f"  {self.question}\n    $ {self.ask}\n"
            f"    {chain['answer']}   (confidence {chain['confidence']:.2f}; the best of {total} regions is "
            f"[{box}] percent)\n"
            f"  stop it\n    $ {self.stop}"
        )


def check_serving() -> None:
    """Raise InvalidInput if what serving needs is not installed: before the rounds, not after them."""
    with require_extra("serve", "the endpoint at the end of the demo"):
        import kserve  # noqa: F401
        import uvicorn  # noqa: F401


def run_endpoint_demo(plan: Plan) -> EndpointTranscript:
    """Publish the base policy and every promoted one, roll out the champion, ask it a question, and stop.

    Raises DemoEndpointFailed, and what publishing raises.
    """
    store, state = FolderStore(plan.run / "store"), plan.run / "serving"
    stop_all_servers(state)
    published = [_publish_round(plan, store, number) for number in (0, *_list_promoted_rounds(plan))]
    _start_champion(store, published[0])
    _abandon_open_rollout(store, state)
    now, digests = champion.read_champion(store, MODEL_NAME).now.sha256, [manifest.sha256 for manifest in published]
    if now not in digests:
        raise DemoEndpointFailed(
            f"{store.url}: the champion is {now[:12]}, which is neither the base of this run nor promoted by it; "
            "remove the folder"
        )
    port = _find_free_port()
    try:
        deploy = ""
        for manifest in published[digests.index(now) :]:
            checkpoint = "" if manifest.sha256 == now else manifest.sha256[:12]
            deploy = _run_command(_build_deploy_command(plan, state, port, checkpoint=checkpoint))[0]
        manifest = published[-1]
        golden = manifest.golden[0]
        image = plan.run / "store" / build_checkpoint_key(MODEL_NAME, manifest.sha256) / golden.image
        write_json(plan.run / "question.json", _build_request(manifest, golden, image))
        served = ServerProcess.model_validate_json((state / "servers" / f"{manifest.sha256}.json").read_bytes())
        answer = _ask_endpoint(served.url, plan.run / "question.json")[1]
        ask, through = _ask_endpoint(f"http://127.0.0.1:{port}", plan.run / "question.json")
        for reply in (answer, through):
            if reply["answer"] != golden.answer:
                raise DemoEndpointFailed(
                    f"{ask}: expected the golden answer {golden.answer!r}, got {reply['answer']!r}"
                )
        stop = _run_command(_build_command("deploy", "--stop", "--state", str(state)))[0]
    finally:
        stop_all_servers(state)
    folder = _shorten_path(state.absolute() / "checkpoints" / MODEL_NAME / manifest.sha256)
    values = {"checkpoint": folder, "port": served.url.rpartition(":")[2], "name": MODEL_NAME}
    python, *words = (word.format(**values) for word in SERVE_COMMAND)
    serve = shlex.join([_shorten_path(Path(python)), *words])
    return EndpointTranscript(serve, deploy, ask, through, golden.question, stop)


def _build_deploy_command(plan: Plan, state: Path, port: int, *, checkpoint: str) -> list[str]:
    """The rollout of a published checkpoint; an empty one is the champion's."""
    command = _build_command("deploy", "--target", "local", "--store", str(plan.run / "store"), "--name", MODEL_NAME)
    if checkpoint:
        command += ["--checkpoint", checkpoint]
    return [*command, "--state", str(state), "--port", str(port), "--set", "deploy.step_s=0"]


def _list_promoted_rounds(plan: Plan) -> list[int]:
    """The rounds whose challengers were promoted, in order."""
    content = json.loads((plan.run / "champion.json").read_text(encoding="utf-8"))
    return [int(promotion["round"]) for promotion in content["promotions"]]


def _publish_round(plan: Plan, store: FolderStore, number: int) -> Manifest:
    """Publish the base (0), or a promoted round's policy with its evidence. Publishing twice changes nothing."""
    config = PublishConfig(store=str(store.root), name=MODEL_NAME, round=number, serve=plan.params.serve)
    if number == 0:
        base = {
            "checkpoint": resolve_path(plan.policy),
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
    """Make the base the round-0 champion, unless there is a champion already."""
    try:
        champion.read_champion(store, MODEL_NAME)
    except champion.NoChampion:
        champion.create_champion_pointer(store, base, by="demo")


def _abandon_open_rollout(store: FolderStore, state: Path) -> None:
    """End a rollout that an interrupted demo left open."""
    journal = read_last_journal(store, MODEL_NAME, by="demo")
    if journal is None or journal.ended:
        return
    manifest = read_manifest(store, MODEL_NAME, journal.plan.sha256)
    abandon_rollout(
        journal, LocalTarget(state, store, manifest, journal.plan.settings.steps), "the demo was interrupted"
    )


def _build_command(*args: str) -> list[str]:
    """The `clincot` command as a user would type it, of the interpreter that runs the demo."""
    script = Path(sys.executable).with_name("clincot")
    if not script.is_file():
        return [_shorten_path(Path(sys.executable)), "-m", "clincot", *args]
    is_on_path = shutil.which("clincot") == str(script)
    return ["clincot" if is_on_path else _shorten_path(script), *args]


def _shorten_path(path: Path) -> str:
    """The path relative to the working folder, if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _run_command(command: list[str]) -> tuple[str, str]:
    """Run a command; returns its line and what it printed. Raises DemoEndpointFailed with the end of its output."""
    line = shlex.join(command)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DemoEndpointFailed(f"{line}: ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}")
    return line, done.stdout


def _ask_endpoint(url: str, request: Path) -> tuple[str, dict[str, Any]]:
    """Ask with curl; returns the command line and the chain in the reply."""
    if shutil.which("curl") is None:
        raise DemoEndpointFailed("the demo asks its endpoint with curl, which is not installed: apt-get install curl")
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
    """A chat completion request, as any OpenAI client sends it. A server's model name is that of its line."""
    kind = "jpeg" if image.suffix in (".jpg", ".jpeg") else "png"
    uri = f"data:image/{kind};base64," + base64.b64encode(image.read_bytes()).decode("ascii")
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": golden.question}]
    return {"model": manifest.line, "messages": [{"role": "user", "content": parts}]}


def _find_free_port() -> int:
    """DEFAULT_PORT, or any free port if that one is taken."""
    for port in (DEFAULT_PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoEndpointFailed("no port of 127.0.0.1 is free")
