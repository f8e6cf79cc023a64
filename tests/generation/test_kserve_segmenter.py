"""The grounder for segmenters behind the V2 protocol: the server of examples/segmenter, and replies as they should not
be."""

from __future__ import annotations

import base64
import importlib
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from clincot.config import AnswerConfig, ProposeConfig
from clincot.errors import ModelFailed
from clincot.generation.candidates import answer_regions, plan_first_step
from clincot.generation.kserve_segmenter import KserveSegmenter
from clincot.generation.regions import build_grounders, propose_regions
from clincot.geometry import box_from_xyxy
from clincot.images import decode_mask, encode_mask
from clincot.jsonl import hash_files
from clincot.judging.asking import JudgeRequest, build_judge_conversation
from clincot.models.encoding import read_picture
from clincot.models.protocols import GroundedRegion, GroundingQuery
from clincot.prompts import JudgeStyle
from clincot.records import Question, Region, Study
from clincot.training.rows import SourceRecords, rebuild_conversation
from tests.support.bright import BrightPolicy
from tests.support.http_server import Reply, Request, free_port, serving

EXAMPLE = Path(__file__).parents[2] / "examples" / "segmenter"
WIDTH, HEIGHT = 64, 48


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """64 x 48 pixels of 30 with a bright disc of radius 6 around column 20, row 18."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.where((rows - 18) ** 2 + (columns - 20) ** 2 < 36, 240, 30).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "film.png")
    return Study(
        image="film.png",
        sha256=hash_files(tmp_path / "film.png"),
        width=WIDTH,
        height=HEIGHT,
        modality="chest x-ray",
    )


@pytest.fixture
def question(study: Study) -> Question:
    return Question(study=study.id, text="Is there a nodule?", kind="closed")


@pytest.fixture
def segmenter_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The server of examples/segmenter with its backend `bright`, on loopback."""
    pytest.importorskip("kserve")
    from fastapi import FastAPI
    from kserve import model_server
    from kserve.model_repository import ModelRepository
    from kserve.protocol.dataplane import DataPlane
    from kserve.protocol.model_repository_extension import ModelRepositoryExtension
    from kserve.protocol.rest.server import RESTServer

    monkeypatch.syspath_prepend(str(EXAMPLE))
    server_module, backends = importlib.import_module("server"), importlib.import_module("backends")
    repository = ModelRepository()
    repository.update(server_module.SegmenterModel("segmenter", backends.BrightSegmenter()))
    app = FastAPI()
    monkeypatch.setattr(model_server, "app", app)
    RESTServer("", DataPlane(repository), ModelRepositoryExtension(repository), http_port=0).create_application()
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def ground(url: str, study: Study, folder: Path, *hypotheses: str, **options: Any) -> list[GroundedRegion]:
    question = Question(study=study.id, text="Is there a nodule?", kind="closed")
    [found] = KserveSegmenter(url, "segmenter", **options).ground([GroundingQuery(study, question, hypotheses)], folder)
    return found


def replying(*outputs: dict[str, Any]) -> Any:
    return lambda request: (200, {"model_name": "segmenter", "outputs": list(outputs)})


def masks(*values: Any, datatype: str = "BYTES", shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": "masks", "datatype": datatype, "shape": shape or [len(values)], "data": list(values)}


def disc() -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.asarray((rows - 18) ** 2 + (columns - 20) ** 2 < 36)


# The example's server


def test_regions_of_the_example_keep_their_pixels(segmenter_url: str, study: Study, tmp_path: Path) -> None:
    """The disc spans columns 15 to 25 and rows 13 to 23: 15/64 to 26/64 and 13/48 to 24/48."""
    (found,) = ground(segmenter_url, study, tmp_path, "nodule", "normal")
    assert found.hypothesis == "nodule"
    assert found.confidence == 1.0
    assert found.box == box_from_xyxy((15 / 64, 13 / 48, 26 / 64, 24 / 48))
    assert found.mask is not None
    assert (decode_mask(found.mask) == disc()).all()


def test_a_cut_out_region_looks_the_same_to_policy_judge_and_training(
    segmenter_url: str, study: Study, question: Question, tmp_path: Path
) -> None:
    """propose over the wire -> answer -> judge -> training row: one view, black outside the disc."""
    config = ProposeConfig.model_validate(
        {
            "grounders": {"http": 1},
            "http_url": segmenter_url,
            "http_protocol": "kserve-v2",
            "http_model": "segmenter",
            "http_prompt": "{finding} in {modality}",
            "mask_outside": "blank",
        }
    )
    policy = BrightPolicy()
    grounders = build_grounders(config, policy)
    regions = list(propose_regions([question], {study.id: study}, tmp_path, grounders, config))
    assert [region.grounder for region in regions] == ["http", "whole"]
    assert regions[0].outside == "blank"
    assert "mask" not in regions[1].model_dump(mode="json")
    assert Region.model_validate_json(regions[0].model_dump_json()) == regions[0]

    requests = list(plan_first_step([question], {study.id: study}, regions))
    candidates = list(answer_regions(requests, tmp_path, policy, AnswerConfig()))
    seen = policy.asked[0][-1].pictures[-1]
    pixels_HW = np.asarray(read_picture(seen).convert("L"))
    assert pixels_HW.shape == (12, 12)  # the disc's box is 11 x 11 px; the smallest crop is a quarter of 48 px
    assert set(np.unique(pixels_HW)) == {0, 240}  # of the film's 30 nothing is left
    whole = policy.asked[1][-1].pictures[-1]
    assert np.asarray(read_picture(whole).convert("L")).min() == 30

    request = JudgeRequest(
        candidates[0].id, study, question.text, regions[0].box, "yes", cutout=requests[0].region.cutout
    )
    judged = build_judge_conversation(policy, JudgeStyle(), request, tmp_path)  # type: ignore[arg-type]
    assert judged[-1].pictures[-1] == seen
    sources = SourceRecords(
        {one.id: one for one in candidates},
        {one.id: one for one in regions},
        {question.id: question},
        {study.id: study},
    )
    trained = rebuild_conversation(candidates[0], sources, tmp_path, policy.views)
    assert [turn.pictures for turn in trained if turn.role == "user"][-1] == (seen,)
    assert seen.key != replace(seen, cutout=None).key  # features of a cut-out are its own


def test_clipseg_is_prompted_with_the_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny CLIPSeg with random weights and its real processor: probabilities of the image's size for each text."""
    import torch
    from transformers import (
        CLIPSegConfig,
        CLIPSegForImageSegmentation,
        CLIPSegProcessor,
        CLIPTokenizer,
        ViTImageProcessor,
    )

    monkeypatch.syspath_prepend(str(EXAMPLE))
    backends = importlib.import_module("backends")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPSegConfig(
        text_config=sizes
        | {"vocab_size": len(vocabulary), "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=32,
        extract_layers=[0, 1],
        reduce_dim=16,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=32,
    )
    torch.manual_seed(0)
    CLIPSegForImageSegmentation(config).save_pretrained(tmp_path)
    CLIPSegProcessor(ViTImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path)
    segmenter = backends.ClipSegSegmenter(str(tmp_path))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    one, two = segmenter.segment(image, ["nodule"]), segmenter.segment(image, ["nodule", "effusion"])
    assert one.shape == (1, 48, 64)
    assert two.shape == (2, 48, 64)
    assert np.allclose(one[0], two[0], atol=1e-5)
    assert not np.allclose(two[0], two[1], atol=1e-5)
    assert 0 <= two.min() <= two.max() <= 1


def test_the_example_refuses_what_it_cannot_read(segmenter_url: str) -> None:
    body = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["bm8gcG5n"]}]}
    reply = httpx.post(f"{segmenter_url}/v2/models/segmenter/infer", json=body)
    assert reply.status_code == 400
    assert "expected the inputs image and text, got image" in reply.text


# Other servers: Triton and MLServer return tensors of numbers


@pytest.mark.parametrize(("datatype", "top"), [("FP32", 1.0), ("UINT8", 255), ("UINT8", 1), ("BOOL", True)], ids=str)
def test_masks_as_numbers(study: Study, tmp_path: Path, datatype: str, top: Any) -> None:
    """Half the image's size, row by row: columns 2 to 5 and rows 1 to 2 of 32 x 24."""
    mask_HW = np.zeros((24, 32), dtype=object)
    mask_HW[:] = type(top)(0)
    mask_HW[1:3, 2:6] = top
    tensor = masks(*mask_HW.ravel().tolist(), datatype=datatype, shape=[1, 24, 32])
    scores = {"name": "scores", "datatype": "FP32", "shape": [1], "data": [0.75]}
    with serving(replying(tensor, scores)) as server:
        (found,) = ground(server.url, study, tmp_path, "nodule")
        [request] = server.requests
    assert found.box == box_from_xyxy((2 / 32, 1 / 24, 6 / 32, 3 / 24))
    assert found.confidence == 0.75
    assert request.path == "/v2/models/segmenter/infer"
    image, text = request.body["inputs"]
    assert (text["name"], text["shape"], text["datatype"], text["data"]) == ("text", [1], "BYTES", ["nodule"])
    sent = Image.open(io.BytesIO(base64.b64decode(image["data"][0])))
    assert sent.size == (WIDTH, HEIGHT)


def test_one_request_an_image_and_a_mask_for_each_text(study: Study, tmp_path: Path) -> None:
    """Texts are sorted; the second one has no pixels, so nothing was found."""
    mask = encode_mask(disc())
    rle = json.dumps({"size": [HEIGHT, WIDTH], "counts": mask.counts})
    nothing = json.dumps({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]})
    with serving(replying(masks(rle, nothing))) as server:
        found = ground(server.url, study, tmp_path, "nodule", "effusion", "normal", prompt="{finding} in {modality}")
        [request] = server.requests
    assert request.body["inputs"][1]["data"] == ["effusion in chest x-ray", "nodule in chest x-ray"]
    assert [(one.hypothesis, one.mask) for one in found] == [("effusion", mask)]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "expected an output 'masks', got none"),
        ([masks("x", "y")], "expected one for each of 1 texts, got the shape [2]"),
        ([masks("no png!")], "masks.0: expected a mask in base64"),
        ([masks('{"size": [48, 64], "counts": "0"}')], "masks.0: expected a run-length encoded mask of COCO"),
        ([masks('{"size": [48, 48], "counts": "0"}')], "of the image's proportions (64 x 48), got 48 x 48"),
        ([masks(0.0, datatype="FP64", shape=[1, 1, 1])], "expected the datatype BYTES, FP32, UINT8, BOOL, got FP64"),
        ([masks(*[-3.0] * 12, datatype="FP32", shape=[1, 3, 4])], "logits are not converted here"),
        ([masks(*[0.0] * 11, datatype="FP32", shape=[1, 3, 4])], "expected [1, 3, 4] numbers, got others"),
        (
            [
                masks('{"size": [48, 64], "counts": [3072]}'),
                {"name": "scores", "datatype": "FP32", "shape": [2], "data": [0.5, 0.5]},
            ],
            "scores: expected 1 FP32 numbers",
        ),
    ],
)
def test_an_unusable_reply_names_the_request_and_the_fault(
    study: Study, tmp_path: Path, outputs: list[dict[str, Any]], message: str
) -> None:
    with serving(replying(*outputs)) as server, pytest.raises(ModelFailed) as failure:
        ground(server.url, study, tmp_path, "nodule")
    assert f"POST {server.url}/v2/models/segmenter/infer (film.png)" in str(failure.value)
    assert message in str(failure.value)


def test_the_models_error_is_passed_on(study: Study, tmp_path: Path) -> None:
    def missing(request: Request) -> Reply:
        return 404, {"error": "Model with name segmenter does not exist."}

    with serving(missing) as server, pytest.raises(ModelFailed, match="does not exist"):
        ground(server.url, study, tmp_path, "nodule")


def test_protocol_and_model_name_belong_together() -> None:
    with pytest.raises(ValueError, match="http_protocol kserve-v2 and http_model belong together"):
        ProposeConfig.model_validate({"http_protocol": "kserve-v2"})
    with pytest.raises(ValueError, match="String should match pattern"):
        ProposeConfig.model_validate({"http_prompt": "nodule"})
