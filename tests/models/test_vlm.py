"""A checkpoint in this process as policy and judge."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from clincot.config import JudgeSpec
from clincot.geometry import WHOLE_IMAGE, box_from_xyxy
from clincot.models.checkpoint import UnsupportedCheckpoint, hash_checkpoint
from clincot.models.load import load_judge, load_policy, unload_models
from clincot.models.vlm import VisionLanguageModel, gather_token_logprobs, load_checkpoint
from clincot.models.yes_no import find_yes_no_ids, read_yes_no_ids
from clincot.prompts import (
    ChainStep,
    Conversation,
    PromptFormat,
    Turn,
    chain_prompt,
    finding_prompt,
    region_prompt,
    with_answer,
)
from clincot.records import Study
from tests.support import tiny

LEFT = box_from_xyxy((0.05, 0.1, 0.4, 0.45))
QUESTION = "Is there a nodule in the left lung?"


def openings(model: VisionLanguageModel, shown: list[Study], films: Path) -> list[Conversation]:
    """Of differing length and numbers of pictures."""
    made: list[Conversation] = []
    for number, study in enumerate(shown[:4]):
        text = QUESTION * (1 + number % 3)
        made.append(chain_prompt(study, films, model.views, [ChainStep(text, LEFT, False)]))
        made.append(region_prompt(study, films, model.views, text))
    return [*made, finding_prompt(shown[0], films, model.views, finding="a nodule", box=LEFT)]


def write(
    model: VisionLanguageModel, asked: list[Conversation], seeds: list[int], temperature: float = 1.0
) -> list[str]:
    replies = model.generate(asked, max_new_tokens=8, temperature=temperature, seeds=seeds)
    return [reply.text for reply in replies]


def test_a_generation_says_how_long_its_prompt_was(small: VisionLanguageModel, shown: list[Study], films: Path) -> None:
    """The encoded conversation without padding, pictures included."""
    asked = openings(small, shown, films)
    replies = small.generate(asked, max_new_tokens=2, temperature=0.0, seeds=[0] * len(asked))
    lengths = [len(small.encoder.encode(conversation, reply=True).ids) for conversation in asked]
    assert [reply.prompt_tokens for reply in replies] == lengths
    assert len(set(lengths)) > 2


def test_a_seed_says_the_same_alone_and_in_any_batch(
    small: VisionLanguageModel, small_dir: Path, shown: list[Study], films: Path
) -> None:
    asked = openings(small, shown, films)
    seeds = list(range(10, 10 + len(asked)))
    together = write(small, asked, seeds)
    assert [write(small, [c], [s])[0] for c, s in zip(asked, seeds, strict=True)] == together
    assert write(small, asked[::-1], seeds[::-1])[::-1] == together
    assert write(VisionLanguageModel(small_dir, batch_size=2), asked, seeds) == together
    assert write(small, asked, [s + 100 for s in seeds]) != together


def test_without_temperature_a_seed_says_nothing(small: VisionLanguageModel, shown: list[Study], films: Path) -> None:
    asked = openings(small, shown, films)
    first = write(small, asked, [0] * len(asked), temperature=0.0)
    assert write(small, asked, list(range(len(asked))), temperature=0.0) == first


def test_log_probabilities_are_the_models_own_at_temperature_1(
    small: VisionLanguageModel, shown: list[Study], films: Path
) -> None:
    """Whatever the temperature of sampling: the first token's stands among the next token's log-probabilities."""
    asked = openings(small, shown, films)
    for temperature in (0.0, 0.5, 1.5):
        replies = small.generate(asked, max_new_tokens=4, temperature=temperature, seeds=[3] * len(asked))
        for conversation, reply in zip(asked, replies, strict=True):
            encoded = small.encoder.encode(conversation, reply=True)
            assert 1 <= len(reply.token_logprobs) <= 4
            with torch.inference_mode():
                first = small.compute_next_token_logprobs([encoded])[0]
            assert min((first - reply.token_logprobs[0]).abs()) < 1e-4


def test_answers_score_as_the_sum_over_their_tokens(
    small: VisionLanguageModel, shown: list[Study], films: Path
) -> None:
    """log P(answer) = sum of log P(token | before), token by token through next_token_logprobs."""
    opening = openings(small, shown, films)[0]
    whole = small.encoder.encode(with_answer(opening, "upper yes"))
    start = len(small.encoder.encode(opening, reply=True).ids)
    expected = 0.0
    for at in range(start, len(whole.ids)):
        before = type(whole)(whole.ids[:at], whole.actions[:at], whole.pictures)
        expected += float(small.compute_next_token_logprobs([before])[0, whole.ids[at]])
    other = with_answer(openings(small, shown, films)[1], "no")  # another length beside it: padding must not count
    score, _ = small.compute_answer_logprobs([with_answer(opening, "upper yes"), other])
    assert score == pytest.approx(expected, abs=1e-3)
    assert small.compute_answer_logprobs([other])[0] == pytest.approx(
        small.compute_answer_logprobs([with_answer(opening, "a"), other])[1]
    )


def test_p_yes_is_the_softmax_over_both_words(small: VisionLanguageModel, shown: list[Study], films: Path) -> None:
    """P(yes) / (P(yes) + P(no)), every casing that is one token counted."""
    asked = openings(small, shown, films)
    tokenizer = small.encoder.tokenizer
    encoded = [small.encoder.encode(c, reply=True) for c in asked]
    for p, one in zip(small.p_yes(asked), encoded, strict=True):
        probabilities = small.compute_next_token_logprobs([one])[0].exp()
        mass = {}
        for word in ("yes", "no"):
            forms = {
                tuple(tokenizer(f + c, add_special_tokens=False)["input_ids"])
                for f in ("", " ")
                for c in (word, word.title(), word.upper())
            }
            mass[word] = sum(float(probabilities[form[0]]) for form in forms if len(form) == 1)
        assert p == pytest.approx(mass["yes"] / (mass["yes"] + mass["no"]), abs=2e-6)


@pytest.mark.parametrize(("share", "scored"), [(1.1e-3, True), (0.9e-3, False)])
def test_p_yes_is_none_below_a_thousandth_of_the_mass(
    share: float,
    scored: bool,
    small_dir: Path,
    small: VisionLanguageModel,
    shown: list[Study],
    films: Path,
    tmp_path: Path,
) -> None:
    """A checkpoint that is about to say another word w: its row of the output head is set along the last hidden state.

    Every other word is to keep the share s = share / (P(yes) + P(no)) of its probability, so that w gets the rest,
    1 - s (1 - P(w)). Its logit rises by the logarithm of (1 - s (1 - P(w))) / (s P(w)). The ratio of yes and no stays.
    """
    asked = [finding_prompt(shown[0], films, small.views, finding="a nodule", box=LEFT)]
    encoded = small.encoder.encode(asked[0], reply=True)
    inputs = small._build_inputs([encoded], side="left")
    with torch.inference_mode():
        out = small.model(**inputs, output_hidden_states=True)
    hidden, logits = out.hidden_states[-1][0, -1], out.logits[0, -1]
    before = torch.softmax(logits.double(), -1)
    yes, no = small.yes_no_ids
    mass = float(before[yes].sum() + before[no].sum())
    word = max({*range(len(logits))} - {*encoded.ids, *yes, *no})  # the head is the embedding, too
    kept, said = share / mass, float(before[word])
    wanted = float(logits[word]) + math.log((1 - kept * (1 - said)) / (kept * said))
    folder = copied(small_dir, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (head,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights[head][word] = hidden * wanted / hidden.dot(hidden)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = VisionLanguageModel(folder)
    after = model.compute_next_token_logprobs([encoded])[0].exp()
    assert float(after[yes].sum() + after[no].sum()) == pytest.approx(share, rel=1e-3)
    expected = small.p_yes(asked)[0] if scored else None
    assert model.p_yes(asked)[0] == (pytest.approx(expected, abs=1e-4) if scored else None)


def test_shared_features_and_plain_pixels_say_the_same(
    small_dir: Path, small: VisionLanguageModel, shown: list[Study], films: Path
) -> None:
    asked = openings(small, shown, films)
    plain = VisionLanguageModel(small_dir)
    plain.shares_features, plain.unshared_reason = False, "compared"
    assert small.shares_features
    assert small.p_yes(asked) == pytest.approx(plain.p_yes(asked), abs=1e-5)
    said = [with_answer(c, "upper yes") for c in asked]
    assert small.compute_answer_logprobs(said) == pytest.approx(plain.compute_answer_logprobs(said), abs=1e-4)


def test_the_picture_matters(small: VisionLanguageModel, shown: list[Study], films: Path) -> None:
    asked = [finding_prompt(s, films, small.views, finding="a nodule", box=LEFT) for s in shown[:3]]
    assert len(set(small.p_yes(asked))) == 3


def test_as_many_seeds_as_conversations(small: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match="1 conversations, 2 seeds"):
        small.generate([(Turn("user", "a"),)], max_new_tokens=1, temperature=0, seeds=[1, 2])


def test_relevance_sums_to_the_change_of_the_log_odds(
    small: VisionLanguageModel, shown: list[Study], films: Path
) -> None:
    """Completeness of integrated gradients: a map's sum is log P(yes)/P(no) of the picture less that of a picture
    which looks everywhere like the mean of all pictures asked about (8 steps: to within 2 %)."""
    asked = [
        finding_prompt(study, films, small.views, finding="a nodule", box=box)
        for study in shown[:3]
        for box in (LEFT, box_from_xyxy((0.5, 0.5, 0.8, 0.8)))
    ]
    maps = small.compute_relevance(asked)
    assert [m.shape for m in maps] == [(2, 2)] * 6
    features = torch.cat([small.encode_pictures(c[0].pictures) for c in asked])

    def odds(look_FTH: torch.Tensor) -> torch.Tensor:
        inputs = small._build_inputs([small.encoder.encode(c, reply=True) for c in asked], side="left")
        inputs["mm_encoder_outputs"]["image"].pooler_output = look_FTH
        with torch.inference_mode():
            logits = small.model(**inputs, logits_to_keep=1).logits[:, -1].double()
        yes, no = small.yes_no_ids
        return torch.logsumexp(logits[:, yes], 1) - torch.logsumexp(logits[:, no], 1)

    gained = (odds(features) - odds(features.mean((0, 1)).expand_as(features))).tolist()
    assert [float(m.sum()) for m in maps] == pytest.approx(gained, rel=0.02, abs=2e-3)
    assert max(map(abs, gained)) > 0.1  # far above the tolerance


def test_relevance_is_of_the_last_picture_in_any_batch(
    small: VisionLanguageModel, small_dir: Path, shown: list[Study], films: Path
) -> None:
    """Conversations of one and of five pictures, one by one and together; only the common look must be the same."""
    whole = [chain_prompt(study, films, small.views, [ChainStep(QUESTION, LEFT, False)]) for study in shown[:2]]
    asked = [*whole, *(finding_prompt(study, films, small.views, finding="a nodule", box=LEFT) for study in shown[:2])]
    together = small.compute_relevance(asked)
    one_by_one = VisionLanguageModel(small_dir, batch_size=1).compute_relevance(asked)
    for a, b in zip(together, one_by_one, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    # the last pictures are the same two crops twice, but what is said about them is not
    assert abs(together[0] - together[2]).max() > 1e-4


def test_log_probabilities_of_tokens_by_hand() -> None:
    """Two words with logits (0, ln 3): P = 1/4 and 3/4. Ids 1, 0, 1: the first is given, then 1/4, then 3/4."""
    logits = torch.tensor([[[0.0, math.log(3.0)]] * 3])
    logp = gather_token_logprobs(logits, torch.tensor([[1, 0, 1]]))
    assert logp.tolist()[0] == pytest.approx([math.log(0.25), math.log(0.75)], abs=1e-6)


def test_a_tokenizer_without_yes_is_refused(small_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_dir)
    yes, no = find_yes_no_ids(tokenizer, "here")
    assert {tokenizer.decode([i]).strip().lower() for i in yes} == {"yes"}
    assert {tokenizer.decode([i]).strip().lower() for i in no} == {"no"}

    assert read_yes_no_ids(small_dir) == (*yes, *no)  # what a transformer, without the model, asks vLLM for
    assert read_yes_no_ids(small_dir.parent) == ()

    class Without:
        """The tokenizer with "yes" (or "no") in two tokens each."""

        unk_token_id = None

        def __init__(self, missing: str) -> None:
            self.missing = missing

        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            return {"input_ids": [1, 2] if text.strip().lower() == self.missing else [7]}

    for missing in ("yes", "no"):
        with pytest.raises(UnsupportedCheckpoint, match=f"here: the tokenizer has no single token for '{missing}'"):
            find_yes_no_ids(Without(missing), "here")


def test_yes_and_no_in_one_token_are_refused_as_what_they_are() -> None:
    """A tokenizer that makes one and the same token of both (an unknown-word token without a name)."""

    class Same:
        unk_token_id = None

        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            return {"input_ids": [7]}

    with pytest.raises(UnsupportedCheckpoint, match="one token for yes and no"):
        find_yes_no_ids(Same(), "here")


def copied(small_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_dir, tmp_path / "model"))


@pytest.mark.parametrize("missing", ["yes", "no"])
def test_a_checkpoint_whose_tokenizer_lacks_the_word_is_refused(missing: str, small_dir: Path, tmp_path: Path) -> None:
    """Its tokenizer's merges that make the word, in every casing and with a space (Ġ) or not, are taken out."""
    folder = copied(small_dir, tmp_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [m for m in merges if "".join(m).lower().lstrip("ġ") != missing]
    assert len(content["model"]["merges"]) < len(merges)
    path.write_text(json.dumps(content))
    message = rf"{folder}: the tokenizer has no single token for '{missing}', so P\(yes\) cannot be read; use a"
    with pytest.raises(UnsupportedCheckpoint, match=message):
        _ = VisionLanguageModel(folder).yes_no_ids  # a policy that only writes regions may do without


def test_pickled_weights_are_not_read(small_dir: Path, tmp_path: Path) -> None:
    folder = copied(small_dir, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedCheckpoint, match=r"model: no \*\.safetensors in this folder; pickled weights"):
        VisionLanguageModel(folder)


def test_a_folder_without_a_chat_template_is_refused(small_dir: Path, tmp_path: Path) -> None:
    folder = copied(small_dir, tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedCheckpoint, match="no chat template"):
        VisionLanguageModel(folder)


def test_a_model_of_text_alone_is_refused(small_dir: Path, tmp_path: Path) -> None:
    folder = copied(small_dir, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config["text_config"], "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UnsupportedCheckpoint, match="is no model that reads images and writes text"):
        VisionLanguageModel(folder)


def test_cut_off_weights_are_refused(small_dir: Path, tmp_path: Path) -> None:
    folder = copied(small_dir, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UnsupportedCheckpoint, match=str(folder)):
        VisionLanguageModel(folder)


def test_a_name_that_is_nowhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnsupportedCheckpoint, match="nowhere"):
        VisionLanguageModel(tmp_path / "nowhere")


def test_qwen_without_torchvision_says_so(small_dir: Path, tmp_path: Path) -> None:
    """Its video processor needs torchvision, which is not installed; the message says so and what runs without."""
    folder = copied(small_dir, tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"})
    )
    with pytest.raises(UnsupportedCheckpoint, match=r"needs torchvision, which is not installed here; run `pip"):
        VisionLanguageModel(folder)


def test_a_package_that_is_missing_is_named(small_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolVLM's processor asks for num2words, whether torchvision is installed or not."""

    def refuse(path: str) -> None:
        raise ImportError("Package `num2words` is required to run SmolVLM processor.")

    monkeypatch.setattr("clincot.models.inspection.load_processor", refuse)
    with pytest.raises(UnsupportedCheckpoint, match="needs a package that is not installed here: Package `num2words`"):
        load_checkpoint(str(small_dir))


def test_an_error_that_is_not_about_a_package_is_not_explained(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("clincot.models.inspection.load_processor", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        load_checkpoint(str(small_dir))


def test_a_torchvision_of_another_torch_is_named(small_dir: Path, tmp_path: Path) -> None:
    """With the CUDA wheel beside the CPU torch, `import torchvision` fails, and so do imports of transformers."""
    broken = tmp_path / "site"
    (broken / "torchvision").mkdir(parents=True)
    (broken / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    (broken / "torchvision-0.28.0.dist-info").mkdir()
    (broken / "torchvision-0.28.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    code = "import sys; from clincot.models.vlm import load_checkpoint; load_checkpoint(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(broken), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(small_dir)], env=environment, capture_output=True, text=True, check=False
    )
    last = run.stderr.strip().splitlines()[-1]
    assert "UnsupportedCheckpoint" in last
    assert f"{small_dir}: torchvision is installed but does not work with torch {torch.__version__} (operator" in last


def test_the_digest_follows_weights_and_views_and_not_logs(small_dir: Path, tmp_path: Path) -> None:
    folder = copied(small_dir, tmp_path)
    before = hash_checkpoint(folder)
    assert before == hash_checkpoint(small_dir)
    (folder / "train_log.json").write_text("[]")
    (folder / "record.json").write_text("{}")
    assert hash_checkpoint(folder) == before
    (folder / "clincot.json").write_text(PromptFormat().model_dump_json())
    assert hash_checkpoint(folder) != before


def test_models_stay_loaded_and_judges_have_their_own_name(small_dir: Path) -> None:
    """A model stays loaded until unload_models, and a judge has its own name."""
    unload_models()
    policy = load_policy(small_dir)
    assert load_policy(str(small_dir)) is policy
    judge = load_judge(JudgeSpec(name="a judge", path=str(small_dir)))
    assert judge.name == "a judge"
    assert judge.digest == policy.digest
    unload_models()
    assert load_policy(small_dir) is not policy


def test_features_are_those_of_the_processor_that_asks(
    small: VisionLanguageModel, small_dir: Path, shown: list[Study], films: Path, tmp_path: Path
) -> None:
    """Two checkpoints with one tower and other image statistics: what one has seen is not what the other would."""
    folder = copied(small_dir, tmp_path)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["image_std"] = [0.5] * 3
    path.write_text(json.dumps(config))
    asked = [chain_prompt(shown[0], films, small.views, [ChainStep(QUESTION, WHOLE_IMAGE, False)])]
    first = small.p_yes(asked)
    plain = VisionLanguageModel(folder)
    plain.shares_features, plain.unshared_reason = False, "compared"
    other = VisionLanguageModel(folder)
    assert other.p_yes(asked) == pytest.approx(plain.p_yes(asked), abs=1e-5)
    assert other.p_yes(asked) != first


def test_tiny_models_have_digests_of_their_own(small_dir: Path, tmp_path: Path) -> None:
    assert hash_checkpoint(tiny.write_model(tmp_path / "b", seed=1)) != hash_checkpoint(small_dir)


def test_a_reply_says_whether_it_was_cut_off(small_dir: Path, shown: list[Study], films: Path) -> None:
    """With every token an end of turn nothing is cut off; with the padding token alone everything is."""
    model = VisionLanguageModel(small_dir)
    asked = openings(model, shown, films)[:3]
    every = frozenset(range(len(model.encoder.tokenizer)))
    for ends, cut_off, tokens in ((every, False, 1), (frozenset({0}), True, 4)):
        model.encoder.end_ids = ends
        replies = model.generate(asked, max_new_tokens=4, temperature=1.0, seeds=[1, 2, 3])
        assert {(reply.cut_off, len(reply.token_logprobs)) for reply in replies} == {(cut_off, tokens)}
