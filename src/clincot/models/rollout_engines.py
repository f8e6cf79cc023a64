"""The models of a stage, run by the engine that its section names.

`transformers` loads them into this process (load.py). `vllm` starts a server for each, and `url` takes the policy from
an endpoint. A server stays for the following stages of this process if they need the same checkpoints; it is stopped
before other models are loaded, before training (`free_models`), and at the end of the process. What needs torch is
imported with the first model that does: a panel of endpoints has none.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from clincot import __version__
from clincot.config import EngineConfig, FrozenConfig, JudgeSpec, VllmConfig
from clincot.errors import InvalidInput
from clincot.jsonl import hash_files
from clincot.models.checkpoint import hash_checkpoint
from clincot.models.device_workers import stop_device_workers
from clincot.models.load import load_judge, load_policy, unload_models
from clincot.models.precision import choose_device, choose_dtype
from clincot.models.protocols import Judge, Policy
from clincot.models.reply_log import ReplyLog
from clincot.models.vllm_server import CacheUse, VllmServer, find_served_weights, start_vllm
from clincot.records import hash_json

_log = logging.getLogger(__name__)

_ServerKey = tuple[str, str, float, VllmConfig]  # name of the weights, dtype, share of the GPU memory, settings
_servers: dict[_ServerKey, VllmServer] = {}


def free_models() -> None:
    """Unload the models of this process and of its workers, and stop its servers, so that training has the memory."""
    stop_device_workers()
    _stop_servers()
    unload_models()


@contextmanager
def open_policy(
    checkpoint: Path, engine: EngineConfig, *, dtype: str, log: Path, inputs: Mapping[str, Path], config: FrozenConfig
) -> Iterator[Policy]:
    """The policy of a stage, by its engine.

    log: file of the replies so far, which is deleted when the block ends without error; with the engine `transformers`
    there is none. inputs, config: those of the stage; with others a log is started anew.
    """
    if engine.kind == "transformers":
        _stop_servers()
        yield load_policy(checkpoint, dtype=dtype)
        return
    server = None
    if engine.kind == "vllm":
        (server,) = _ensure_servers([checkpoint], engine.vllm, dtype)
    from clincot.models.served_checkpoint import ServedCheckpoint

    replies = ReplyLog(log, build_progress_key(config, inputs))
    if len(replies):
        _log.warning("%s: %d replies of an interrupted run are used", log, len(replies))
    try:
        yield ServedCheckpoint(checkpoint, engine, server=server, log=replies)
    except BaseException:
        replies.close(complete=False)
        raise
    replies.close(complete=True)


def open_judges(specs: Sequence[JudgeSpec], engine: EngineConfig, *, dtype: str) -> list[Judge]:
    """The judges of a panel in order: endpoints by their url, the others by the engine.

    Their servers run at the same time and divide the GPU's memory. Judges of text run in this process.
    """
    if engine.kind != "vllm":
        _stop_servers()
        return [load_judge(spec, dtype=dtype) for spec in specs]
    served = [spec for spec in specs if not spec.url and not spec.text_only]
    for spec in served:
        if not Path(spec.checkpoint).is_dir():
            raise InvalidInput(
                f"judge {spec.name!r}: models.engine vllm needs a checkpoint folder, got {spec.path!r}; download it, "
                "or set models.engines to {judge: transformers}"
            )
    from clincot.models.served_checkpoint import ServedCheckpoint

    servers = dict(zip(served, _ensure_servers([Path(s.checkpoint) for s in served], engine.vllm, dtype), strict=True))
    judges: list[Judge] = []
    for spec in specs:
        if spec in servers:
            judge = ServedCheckpoint(Path(spec.checkpoint), engine, name=spec.name, server=servers[spec])
            judges.append(judge)
        else:
            judges.append(load_judge(spec, dtype=dtype))
    return judges


def measure_cache_use(models: Sequence[Policy | Judge]) -> dict[str, float]:
    """The use of the prefix caches by a stage's models, as metrics of the stage; {} without a vLLM server."""
    if not _servers:
        return {}
    from clincot.models.served_checkpoint import ServedCheckpoint

    served = [model for model in models if isinstance(model, ServedCheckpoint) and model.server is not None]
    if not served:
        return {}
    used = sum((model.take_cache_use() for model in served), CacheUse())
    return {"prompt_tokens": used.prompt_tokens, "prompt_tokens_cached": used.cached_tokens}


def build_progress_key(config: FrozenConfig, inputs: Mapping[str, Path]) -> str:
    """Changes with everything that decides a stage's replies: code version, config and input files.

    The questions name their images by sha256, so the images need not be read again, and a request's hash contains the
    policy's digest.
    """
    files = {name: hash_files(path) for name, path in sorted(inputs.items()) if path.is_file()}
    return hash_json([__version__, config.model_dump(mode="json"), files])


def _ensure_servers(checkpoints: Sequence[Path], settings: VllmConfig, dtype: str) -> list[VllmServer]:
    """Running servers of the checkpoints; those of others are stopped, and models of this process unloaded."""
    from clincot.models.served_checkpoint import get_served_name

    device = choose_device()
    kind = choose_dtype("auto" if dtype == "inherit" else dtype, device)
    share = 1 / max(1, len(checkpoints))
    keys = [(get_served_name(hash_checkpoint(folder)), kind, share, settings) for folder in checkpoints]
    for key in [key for key, server in _servers.items() if key not in keys or not server.is_running]:
        _servers.pop(key).stop()
    unload_models()
    for key, folder in zip(keys, checkpoints, strict=True):  # one after the other: each measures what memory is free
        if key not in _servers:
            _log.warning("starting vLLM for %s (%s, %s)", folder, kind, device)
            _servers[key] = start_vllm(
                find_served_weights(folder), key[0], dtype=kind, device=device, share=share, settings=settings
            )
    return [_servers[key] for key in keys]


def _stop_servers() -> None:
    while _servers:
        _servers.popitem()[1].stop()


atexit.register(_stop_servers)
