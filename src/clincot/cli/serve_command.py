"""`clincot serve`: a checkpoint behind an HTTP server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from clincot.cli.framework import Commands, add_command
from clincot.config import is_shipped, resolve_path
from clincot.errors import require_extra
from clincot.processes import share_cores

SERVING_PANEL = "Serving and deployment"
AFTERWARDS = """\
Then open http://localhost:8080 in a browser, or from another shell:

  curl -s localhost:8080/v1/models/policy:predict -H 'Content-Type: application/json' -d '{"instances": [
    {"question": "Is there a nodule?", "image": "data:image/png;base64,'$(base64 -w0 film.png)'"}]}'

The settings are in src/clincot/config/server_settings.py, the request formats in docs/guides/querying.md and in the
server's /openapi.json.
"""


def add_serve_command(commands: Commands) -> None:
    """Add `serve`."""
    add_command(commands, "serve", serve_checkpoint, ServeArguments, panel=SERVING_PANEL, epilog=AFTERWARDS)


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """What is served, and where. KServe passes some flags with underscores."""

    checkpoint: Annotated[
        str,
        typer.Option(
            "--checkpoint",
            metavar="PATH_OR_S3_URI",
            help="Checkpoint to serve: a folder written by `clincot train`, or the address of a published one.",
        ),
    ]
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", "--http_port", min=0, max=65535, help="Port to listen on.")] = 8080
    grpc_port: Annotated[
        int,
        typer.Option(
            "--grpc-port",
            "--grpc_port",
            min=0,
            max=65535,
            help="Port for the V2 protocol over gRPC, for instance 8081 (default: no gRPC).",
        ),
    ] = 0
    model_name: Annotated[
        str,
        typer.Option(
            "--model-name",
            "--model_name",
            help="Name of the model in requests (default: the checkpoint folder's name).",
        ),
    ] = ""
    api_keys: Annotated[
        Path | None,
        typer.Option(
            "--api-keys", metavar="PATH", help="File of API keys, or folder of such files (a mounted secret)."
        ),
    ] = None
    abstain_below: Annotated[
        float | None,
        typer.Option("--abstain-below", metavar="CONFIDENCE", help="The same as --set abstain_below=CONFIDENCE."),
    ] = None
    predictor_host: Annotated[
        str,
        typer.Option(
            "--predictor_host",
            "--predictor-host",
            metavar="HOST[:PORT]",
            help="Address of a vLLM predictor that runs the model; without it, the model runs in this process.",
        ),
    ] = ""
    predictor_path: Annotated[
        str, typer.Option("--predictor-path", metavar="PATH", help="Path of the predictor's OpenAI routes.")
    ] = "/v1"
    predictor_model: Annotated[
        str,
        typer.Option(
            "--predictor-model", metavar="NAME", help="Model name at the predictor (default: the only one it serves)."
        ),
    ] = ""
    predictor_key_env: Annotated[
        str,
        typer.Option(
            "--predictor-key-env", metavar="NAME", help="Environment variable that holds the predictor's API key."
        ),
    ] = ""
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="Whether browsers get a page at / to try the model.")
    ] = True
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Set one setting of the server; may be repeated: --set running=16"
        ),
    ] = field(default_factory=list)


def serve_checkpoint(args: ServeArguments) -> int:
    """Serve a checkpoint over HTTP, with the OpenAI and the KServe V1 and V2 protocols."""
    share_cores()  # before anything imports torch
    with require_extra("serve", "serving"):
        from clincot.serving.server import ServePlan, run_server
    from clincot.config.server_settings import load_serve_settings

    overrides = tuple(args.overrides)
    if not args.page:
        overrides = (*overrides, "page=false")
    if args.abstain_below is not None:
        overrides = (*overrides, f"abstain_below={args.abstain_below}")
    run_server(
        ServePlan(
            checkpoint=str(resolve_path(args.checkpoint)) if is_shipped(args.checkpoint) else args.checkpoint,
            settings=load_serve_settings(overrides),
            name=args.model_name,
            host=args.host,
            port=args.port,
            grpc_port=args.grpc_port,
            api_keys=args.api_keys,
            predictor_host=args.predictor_host,
            predictor_path=args.predictor_path,
            predictor_model=args.predictor_model,
            predictor_key_env=args.predictor_key_env,
        )
    )
    return 0
