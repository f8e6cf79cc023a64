"""KServe's data plane, which its HTTP and gRPC servers share, with the parts that differ here."""

from __future__ import annotations

from typing import Any

from kserve import InferRequest
from kserve.protocol.dataplane import DataPlane

from clincot.serving.content_types import BINARY_LENGTH_HEADER
from clincot.serving.tensors import read_binary_request


class VisualCotDataPlane(DataPlane):  # type: ignore[misc]
    """A server is ready if its model is ready.

    A transformer's model is ready if its predictor answers. A server is alive unless only a restart can bring its model
    back.
    """

    async def live(self) -> dict[str, str]:  # the SDK's is static, and always alive
        models = self.model_registry.get_models().values()
        return {"status": "alive" if all(model.check_alive() for model in models) else "stopped"}

    async def ready(self) -> bool:
        models = self.model_registry.get_models()
        return all([await self.model_registry.is_model_ready(name) for name in models])

    def metadata(self) -> dict[str, Any]:
        """The server's metadata; its extension is binary tensors, while models cannot be loaded or unloaded."""
        return {**super().metadata(), "extensions": ["binary_tensor_data"]}

    def decode_inference_request(self, body: Any, headers: dict[str, str], model_name: str) -> InferRequest:
        """Read a V2 request: JSON that FastAPI has parsed, or JSON with binary tensors."""
        if isinstance(body, bytes):
            return read_binary_request(body, headers.get(BINARY_LENGTH_HEADER, ""), model_name)
        return super().decode_inference_request(body, headers, model_name)
