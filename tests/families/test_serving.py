"""The served answer is the answer of the loaded model: chain, regions, confidence and words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from clincot.config import ProposeConfig
from clincot.config.server_settings import ServeSettings
from clincot.errors import InvalidInput
from clincot.generation.visual_cot import ImageQuestion, VisualAnswer, answer_question, check_max_images
from clincot.models.protocols import Generation, Policy, PolicyWrapper
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import Conversation, get_template
from clincot.records import Study
from clincot.serving.middleware import RequestMiddleware
from clincot.serving.server import ServePlan, build_application, build_data_plane, open_backend
from clincot.serving.service import AnswerService
from tests.support.decode_workers import expect_no_new_workers
from tests.support.model_servers import CHAT, PREDICT, chat, data_uri, v1

QUESTION = "Is there a nodule in the left lung?"
SETTINGS = ServeSettings(
    propose=ProposeConfig(grounders={"windows": 2, "written": 1}, window_sides=(0.5,), hypotheses=2, temperature=0.0),
    max_new_tokens=4,
    deadline_s=600.0,
)


@pytest.fixture
def client(checkpoint: Path) -> Iterator[TestClient]:
    """The application of `clincot serve --checkpoint …`, without a port."""
    with expect_no_new_workers():
        service = AnswerService(open_backend(ServePlan(str(checkpoint), settings=SETTINGS), checkpoint), SETTINGS)
        application = build_application(build_data_plane("policy", service), service)
        yield TestClient(RequestMiddleware(application, SETTINGS, None))
        service.close()


def describe(answer: VisualAnswer) -> list[tuple[str, str, str, str]]:
    """The chain in words: where the model looked, and what it said there."""
    return [(r.hypothesis, r.grounder, str(r.box.xyxy), r.answer) for r in answer.regions]


def test_the_served_answer_is_the_models_own(
    client: TestClient, model: VisionLanguageModel, studies: list[Study], films: Path
) -> None:
    """Over both protocols, for films of three shapes. Likelihoods may differ in rounding: batches are others."""
    with client:
        for study in studies[:3]:
            expected = answer_question(ImageQuestion(study, films, QUESTION), model, SETTINGS)
            image = data_uri(films / study.image)
            replies = client.post(PREDICT, json=v1(QUESTION, image)), client.post(CHAT, json=chat(QUESTION, image))
            assert [reply.status_code for reply in replies] == [200, 200], [reply.text for reply in replies]
            bodies = replies[0].json()["predictions"][0], replies[1].json()["clincot"]
            for body in bodies:
                served = VisualAnswer.model_validate(body)
                assert describe(served) == describe(expected)
                assert served.answer == expected.answer
                assert served.policy == expected.policy
                assert served.confidence == pytest.approx(expected.confidence, abs=1e-4)
                for ours, theirs in zip(served.regions, expected.regions, strict=True):
                    assert ours.likelihood == pytest.approx(theirs.likelihood, abs=1e-4)
            message = replies[1].json()["choices"][0]["message"]
            assert message["content"] == (message.get("refusal") or expected.answer)  # cut off: refused
            assert ("refusal" in message) == expected.abstained


class CountingPolicy(PolicyWrapper):
    """Records the tokens of every prompt."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.counts: list[int | None] = []

    def generate(self, conversations: Sequence[Conversation], **options: Any) -> list[Generation]:
        replies = super().generate(conversations, **options)
        self.counts += [reply.prompt_tokens for reply in replies]
        return replies


def test_a_further_image_reaches_the_model(model: VisionLanguageModel, studies: list[Study], films: Path) -> None:
    """Every prompt has the tokens of the prior, too; a family whose prompt is about one image refuses the setting."""
    propose = ProposeConfig.model_validate({"grounders": {"random": 1}, "temperature": 0.0})
    settings = SETTINGS.model_copy(update={"propose": propose, "max_images": 2})
    if get_template(model.views).detect:
        with pytest.raises(InvalidInput, match="expected max_images: 1"):
            check_max_images(settings, model.views)
        return
    check_max_images(settings, model.views)
    counts = []
    for others in ((), ((studies[1], "prior"),)):
        policy = CountingPolicy(model)
        answer = answer_question(ImageQuestion(studies[0], films, QUESTION, others=others), policy, settings)
        assert answer.others == tuple(role for _, role in others)
        counts.append(policy.counts)
    alone, with_prior = counts
    assert len(alone) == len(with_prior) == 2  # a random region and the whole image
    assert all(
        more is not None and less is not None and more > less for more, less in zip(with_prior, alone, strict=True)
    )
