"""Text-only language models as judges: tiny random checkpoints of transformers' own Qwen2 and Mistral classes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clincot.cli.app import main
from clincot.config import JudgeSpec, PreflightConfig
from clincot.geometry import WHOLE_IMAGE, Box, box_from_xyxy
from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.load import load_judge
from clincot.models.text_model import LanguageModelJudge
from clincot.preflight.judges import build_judge_probes
from clincot.preflight.preflight_report import PreflightCheck
from clincot.preflight.probe import run_probes
from clincot.prompts import Conversation, describe_box, text_judge_prompt
from tests.support.families import build_llama_tokenizer, build_qwen_tokenizer

# Qwen3's template in its published shape, as far as thinking is concerned.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module", params=["qwen", "mistral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template (Qwen2), and without one and with a BOS (Mistral, as BioMistral)."""
    from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model: Any
    if request.param == "qwen":
        tokenizer = build_qwen_tokenizer()
        tokenizer.chat_template = TEMPLATE
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **SIZES))
    else:
        tokenizer = build_llama_tokenizer(add_bos_token=True)
        model = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), **SIZES))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts() -> list[Conversation]:
    box = box_from_xyxy((0.0, 0.0, 0.25, 0.25))
    return [
        text_judge_prompt(question="Is there a nodule?", answer="no", box=box),
        text_judge_prompt(
            question="Where is it, and how large is it?", answer="upper left lung", box=box, finding="mass"
        ),
        text_judge_prompt(question="Normal?", answer="yes", box=WHOLE_IMAGE, reference="no"),
    ]


def test_p_yes_is_the_models_own(checkpoint: Path) -> None:
    """Each prompt alone through transformers, without padding, against one batch with padding."""
    judge = LanguageModelJudge(checkpoint)
    expected = []
    for (turn,) in prompts():
        tokenizer, messages = judge.tokenizer, [{"role": "user", "content": turn.text}]
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        else:
            ids = tokenizer(turn.text + "\nAnswer:", return_tensors="pt")["input_ids"]
            assert ids[0, 0] == tokenizer.bos_token_id
        with torch.inference_mode():
            p_V = torch.softmax(judge.model(input_ids=ids).logits[0, -1].double(), -1)
        yes, no = p_V[judge._yes].sum(), p_V[judge._no].sum()
        expected.append(float(yes / (yes + no)))
    assert judge.p_yes(prompts()) == pytest.approx(expected, abs=2e-6)
    assert [judge.p_yes([prompt])[0] for prompt in prompts()] == pytest.approx(expected, abs=2e-6)


def test_thinking_off_reaches_the_template(checkpoint: Path) -> None:
    judge = load_judge(JudgeSpec(name="text", path=str(checkpoint), text_only=True, thinking="off"))
    assert isinstance(judge, LanguageModelJudge)
    text = judge.tokenizer.decode(judge._encode(prompts()[0]))
    assert text.endswith("</think>\n\n") == (judge.tokenizer.chat_template is not None)


def test_a_checkpoint_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedCheckpoint, match=r"not a causal language model that transformers can load"):
        load_judge(JudgeSpec(name="text", path=str(tmp_path), text_only=True))


def drop_tensor(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def cut_tensor(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"][:-10].clone()


def damage_tensor(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"].fill_(float("nan"))


def damage_checkpoint(checkpoint: Path, folder: Path, damage: Any) -> Path:
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


DAMAGES = [
    (drop_tensor, "weights", "lack 1 tensors of the model, such as model.layers.1.mlp.up_proj.weight"),
    (cut_tensor, "weights", "1 tensors have another shape than config.json says, such as lm_head.weight"),
    (damage_tensor, "generation", "no finite numbers: the weights are damaged"),
]


@pytest.mark.parametrize(("damage", "result"), [(case[0], case[2]) for case in DAMAGES[:2]])
def test_no_tensor_is_random(damage: Any, result: str, checkpoint: Path, tmp_path: Path) -> None:
    """transformers fills what is missing with random numbers; the scores changed with every load."""
    folder = damage_checkpoint(checkpoint, tmp_path / "damaged", damage)
    with pytest.raises(UnsupportedCheckpoint, match=result):
        load_judge(JudgeSpec(name="text", path=str(folder), text_only=True))


def test_an_adapter_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "adapter"))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedCheckpoint, match=r"merge it first \(peft: merge_and_unload\)"):
        load_judge(JudgeSpec(name="text", path=str(folder), text_only=True))


def test_a_template_that_fails_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "template"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    judge = load_judge(JudgeSpec(name="text", path=str(folder), text_only=True))
    with pytest.raises(UnsupportedCheckpoint, match="the chat template fails: TemplateError: no; copy chat_template"):
        judge.p_yes(prompts())


def examine_in_preflight(folder: Path) -> list[PreflightCheck]:
    judge = {"judges": [{"name": "a", "path": str(folder), "text_only": True}], "quorum": 1}
    config = PreflightConfig.model_validate({"timeout_s": 60.0, "free_gb": 0.0, "judge": judge})
    return run_probes(build_judge_probes(config))


def test_preflight_passes_a_sound_judge(checkpoint: Path) -> None:
    checks = {check.name: check for check in examine_in_preflight(checkpoint)}
    assert {check.state for check in checks.values()} == {"pass"}
    assert "P(yes) " in checks["judge a: generation"].result


@pytest.mark.parametrize(("damage", "name", "result"), DAMAGES)
def test_preflight_refuses_by_name(damage: Any, name: str, result: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = damage_checkpoint(checkpoint, tmp_path / "damaged", damage)
    (failed,) = (check for check in examine_in_preflight(folder) if check.state == "fail")
    assert failed.name == f"judge a: {name}"
    assert result in failed.result
    assert "the same published checkpoint" in failed.remedy


def test_the_doctor_examines_a_text_judge(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", str(checkpoint), "--as", "text-judge"]) == 0
    assert "can be used as text-judge" in capsys.readouterr().out
    (tmp_path / "config.json").write_text('{"model_type": "idefics3"}')
    assert main(["doctor", str(tmp_path), "--as", "text-judge", "--no-generate"]) == 1
    assert "not a causal language model that transformers can load" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("box", "words"),
    [
        (box_from_xyxy((0.0, 0.0, 0.25, 0.3)), "the upper left part, 25 % of the width and 30 % of the height"),
        (box_from_xyxy((0.4, 0.4, 0.6, 0.6)), "the centre, 20 % of the width and 20 % of the height"),
        (box_from_xyxy((0.8, 0.3, 1.0, 0.7)), "the right part, 20 % of the width and 40 % of the height"),
        (box_from_xyxy((0.3, 0.9, 0.7, 1.0)), "the lower part, 40 % of the width and 10 % of the height"),
        (WHOLE_IMAGE, "the whole image"),
    ],
)
def test_a_region_in_words(box: Box, words: str) -> None:
    assert describe_box(box) == words


def test_the_reference_is_in_the_prompt_only_if_given() -> None:
    with_reference, without = (
        text_judge_prompt(question="Q", answer="A", box=WHOLE_IMAGE, reference=reference)[0].text
        for reference in ("the key", "")
    )
    assert "Reference answer: the key\n" in with_reference
    assert "eference" not in without
