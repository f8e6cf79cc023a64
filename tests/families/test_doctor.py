"""`clincot doctor` and preflight: each family passes with the right facts; what cannot work is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from clincot.cli.app import main
from clincot.config import PreflightConfig, TrainConfig
from clincot.images import InvalidImage
from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.inspection import find_torchvision_command
from clincot.models.load import load_judge, unload_models
from clincot.models.vlm import VisionLanguageModel, load_checkpoint
from clincot.planning import gpu_memory
from clincot.planning.gpu_memory import GIB
from clincot.planning.model_sizes import ModelSize, measure_model
from clincot.preflight import doctor, judges, starting_policy
from clincot.preflight.preflight_report import PreflightCheck
from clincot.preflight.probe import run_probes
from clincot.prompts import ImageView, Turn
from tests.support import families
from tests.support.families import FAMILIES, Family

SOUND = next(family for family in FAMILIES if family.name == "llava-mistral")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a params.yaml, so that the neutral defaults are the recipe."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def run_doctor(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> tuple[int, dict[str, list[str]]]:
    """(exit code, {check: [state, probe, result, remedy]}) as the table shows them."""
    code = main(["doctor", str(path), *words])
    rows = [
        line.removeprefix("| ").removesuffix(" |").split(" | ")
        for line in capsys.readouterr().out.splitlines()
        if " | " in line
    ]
    return code, {row[0]: [*(cell.strip(" ").replace("\\|", "|") for cell in row[1:]), ""] for row in rows[2:]}


# --- what works


def count_weights(checkpoint: Path) -> int:
    """Numbers in the safetensors; a tied head is stored once."""
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def count_film_tokens(model: VisionLanguageModel) -> int:
    """Image tokens of a film of 1024 x 1024 pixels by the processor itself."""
    encoder = model.encoder
    film = Image.new("RGB", (1024, 1024), (96, 96, 96))
    ids = encoder.processor(text=[encoder.placeholder], images=[[film]], return_tensors="pt")["input_ids"][0].tolist()
    return sum(token in encoder.image_ids for token in ids)


@pytest.mark.parametrize("role", ["policy", "judge"])
def test_every_family_is_sound(
    role: str,
    family: Family,
    checkpoint: Path,
    model: VisionLanguageModel,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, table = run_doctor(capsys, checkpoint, "--as", role, "--gpu-memory", "8")
    assert code == 0
    assert {row[0] for row in table.values()} == {"pass"}
    assert type(model.model.config).__name__ in table["config class"][2]
    assert type(model.encoder.processor).__name__ in table["processor"][2]
    for token in family.end_tokens:
        number = model.encoder.tokenizer.convert_tokens_to_ids(token)
        assert f"{token} ({number})" in table["end tokens"][2]
    if model.encoder.pictures_are_independent:
        assert table["image tokens"][2].startswith(f"{count_film_tokens(model)} for the film, ")
    assert re.search(r"yes: \S*yes \(\d+\).*; no: \S*no \(\d+\)", table["yes and no"][2])
    assert table["region form"][2]
    assert f"weights {count_weights(checkpoint) * 2 / GIB:.3g}" in table["memory: serving"][2]
    assert ("memory: training" in table) == (role == "policy")
    assert "on cpu" in table["generation"][2]
    assert ("P(yes)" in table["generation"][2]) == (role == "judge")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "checkpoint"
    SOUND.build(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of a sound checkpoint, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def test_no_tokens_are_written_unless_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, table = run_doctor(capsys, folder, "--no-generate")
    assert (code, table["generation"][0]) == (0, "skipped")


def test_no_tokens_are_written_without_the_memory(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_free_memory", lambda: 1000.0)
    code, table = run_doctor(capsys, folder)
    assert (code, table["generation"][0]) == (0, "skipped")
    assert "this machine has 9.31e-07 GiB free" in table["generation"][2]


# --- what does not


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def name_unknown_class(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="some_new_vl")


def name_llava_med(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llava_mistral")


def name_huatuogpt(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llava_qwen2")


def name_first_llava(folder: Path) -> None:
    edit_json(folder / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")


def name_code_of_a_repository(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="internvl_chat", auto_map={"AutoConfig": "configuration.Chat"})


def name_text_model(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="mistral")


def make_config_impossible(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text, "pad_token_id": 10**6})


def remove_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remove_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def write_template_of_texts(folder: Path) -> None:
    template = "{% for message in messages %}{% for part in message['content'] %}{{ part.get('text', '') }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template + "</s>{% endfor %}")


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if "q_proj" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if "q_proj" in name and name.endswith("weight"))
    weights[name] = weights[name][:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def damage_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if "language_model" in name and "q_proj" in name)
    weights[name].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_adapter(folder: Path) -> None:
    """As peft's save_pretrained into the folder of the full weights."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    save_file({"base_model.q_proj.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


def leave_adapter_only(folder: Path) -> None:
    add_adapter(folder)
    (folder / "model.safetensors").unlink()


def leave_bare_adapter(folder: Path) -> None:
    leave_adapter_only(folder)
    (folder / "config.json").unlink()


def break_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{% if %}")


def write_template_of_strings(folder: Path) -> None:
    template = "{% for message in messages %}{{ '<s>' + message['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)


def let_template_refuse(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text("{{ raise_exception('roles must alternate') }}" + path.read_text())


def remove_end_tokens(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=None)
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    content = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config={**content["text_config"], "eos_token_id": None})
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("eos_token", "''").replace("</s>", ""))


def name_another_image_token(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    name = "image_token_id" if "image_token_id" in content else "image_token_index"
    edit_json(folder / "config.json", **{name: content[name] - 1})


def add_tokens(folder: Path) -> None:
    """More tokens than the embedding has rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(200)])
    tokenizer.save_pretrained(folder / "new")
    shutil.move(folder / "new" / "tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(folder / "new")


def spell_yes_and_no(folder: Path) -> None:
    """The words come apart into letters: no merge makes them, and no token is called so."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = {space + word for word in ("yes", "Yes", "YES", "no", "No", "NO") for space in ("", "\u2581")}
    model = content["model"]
    model["merges"] = [merge for merge in model["merges"] if not words & {*merge, "".join(merge)}]
    model["vocab"] = {f"x{word}x" if word in words else word: number for word, number in model["vocab"].items()}
    path.write_text(json.dumps(content))


Damage = Callable[[Path], None]
DAMAGES: list[tuple[Damage, str, str, str]] = [  # what is done, the check that fails, its result, its remedy
    (name_unknown_class, "config class", "does not know model_type 'some_new_vl'", "tested families"),
    (name_llava_med, "config class", "the original layout of LLaVA-Med 1.5", "clincot convert llava-med"),
    (name_huatuogpt, "config class", "the original layout of HuatuoGPT-Vision", "clincot convert huatuogpt-vision"),
    (name_first_llava, "config class", "original LLaVA repository", "-hf"),
    (name_code_of_a_repository, "config class", "program code of the checkpoint's repository", "-hf"),
    (name_text_model, "config class", "is no model that reads images", "tested families"),
    (make_config_impossible, "config class", "no model that can be built", "copy config.json"),
    (remove_processor, "processor", "no processor_config.json or preprocessor_config.json", "copy the missing"),
    (remove_tokenizer, "processor", "no tokenizer.json", "copy the missing"),
    (pickle_weights, "files", "pytorch_model.bin is pickled", "save the weights as safetensors"),
    (remove_template, "processor", "no chat template", "add chat_template.jinja"),
    (write_template_of_texts, "chat template", "shows 0 picture placeholders", "an image token for every picture"),
    (drop_weight, "weights", "lack 1 tensors of the model, such as", "the same published checkpoint"),
    (cut_weight, "weights", "1 tensors have another shape than config.json says", "the same published checkpoint"),
    (damage_weight, "generation", "no finite numbers: the weights are damaged", "the same published checkpoint"),
    (add_adapter, "files", "a PEFT adapter beside full weights", "merge it first (peft: merge_and_unload)"),
    (leave_adapter_only, "files", "a PEFT adapter without the model's weights", "or give the merged checkpoint"),
    (leave_bare_adapter, "files", "a PEFT adapter without the model's weights", "or give the merged checkpoint"),
    (break_template, "chat template", "fails: TemplateSyntaxError", "copy chat_template.jinja"),
    (write_template_of_strings, "chat template", "fails: TypeError", "content as a list of parts"),
    (let_template_refuse, "chat template", "fails: TemplateError: roles must alternate", "copy chat_template.jinja"),
    (remove_end_tokens, "end tokens", "so answers would not end", "copy generation_config.json"),
    (name_another_image_token, "vocabulary", "and the processor writes", "the processor's files"),
    (add_tokens, "vocabulary", "and the embedding has", "the tokenizer's files"),
    (spell_yes_and_no, "yes and no", "no single token for 'yes'", "whose tokenizer knows yes and no"),
]


@pytest.mark.parametrize(("damage", "name", "result", "remedy"), DAMAGES, ids=[case[0].__name__ for case in DAMAGES])
@pytest.mark.parametrize("role", ["policy", "judge"])
def test_the_doctor_refuses_by_name(
    role: str,
    damage: Damage,
    name: str,
    result: str,
    remedy: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(folder)
    code, table = run_doctor(capsys, folder, "--as", role)
    assert code == 1
    assert [check for check, row in table.items() if row[0] == "**FAIL**"] == [name]
    assert result in table[name][2]
    assert remedy in table[name][3]


def run_preflight(folder: Path, role: str) -> list[PreflightCheck]:
    content: dict[str, Any] = {"timeout_s": 60.0, "free_gb": 0.0}
    if role == "judge":
        content["judge"] = {"judges": [{"name": "a", "path": str(folder)}], "quorum": 1}
        return run_probes(judges.build_judge_probes(PreflightConfig.model_validate(content)))
    return run_probes(starting_policy.build_champion_probes(PreflightConfig(base=str(folder)), []))


@pytest.mark.parametrize("role", ["policy", "judge"])
def test_preflight_passes_a_sound_checkpoint(role: str, folder: Path) -> None:
    checks = run_preflight(folder, role)
    assert {check.state for check in checks} == {"pass"}
    assert checks[-1].name == ("judge a: generation" if role == "judge" else "starting policy: generation")


@pytest.mark.parametrize(("damage", "name", "result", "remedy"), DAMAGES, ids=[case[0].__name__ for case in DAMAGES])
@pytest.mark.parametrize("role", ["policy", "judge"])
def test_preflight_refuses_by_name(
    role: str, damage: Damage, name: str, result: str, remedy: str, folder: Path
) -> None:
    damage(folder)
    (failed,) = (check for check in run_preflight(folder, role) if check.state == "fail")
    assert result in failed.result
    if name != "files":  # preflight itself reads the files, and names the folder's setting
        assert failed.name.endswith(f": {name}")
        assert remedy in failed.remedy


LOADED = [
    case
    for case in DAMAGES
    if case[1] in ("config class", "processor", "weights") or case[0] in (add_adapter, leave_adapter_only)
]


@pytest.mark.parametrize(("damage", "name", "result", "remedy"), LOADED, ids=[case[0].__name__ for case in LOADED])
def test_loading_refuses_in_the_same_words(damage: Damage, name: str, result: str, remedy: str, folder: Path) -> None:
    damage(folder)
    if damage is make_config_impossible:
        result = "the weights cannot be loaded"
    with pytest.raises(UnsupportedCheckpoint, match=re.escape(result)) as caught:
        load_checkpoint(str(folder))
    assert remedy in str(caught.value)


@pytest.mark.parametrize("damage", [break_template, write_template_of_strings, let_template_refuse, remove_end_tokens])
def test_a_model_is_refused_in_the_same_words(damage: Damage, folder: Path) -> None:
    result, remedy = next(case[2:] for case in DAMAGES if case[0] is damage)
    damage(folder)
    with pytest.raises(UnsupportedCheckpoint, match=re.escape(result)) as caught:
        VisionLanguageModel(folder)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("damage", [drop_weight, cut_weight])
def test_headers_are_read_if_no_token_is_written(
    damage: Damage, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --no-generate, and in preflight for weights that are too large for it."""
    damage(folder)
    code, table = run_doctor(capsys, folder, "--no-generate")
    assert (code, table["weights"][0]) == (1, "**FAIL**")
    monkeypatch.setattr(doctor, "MAX_PREFLIGHT_BYTES", 1000.0)
    (failed,) = (check for check in run_preflight(folder, "policy") if check.state == "fail")
    assert failed.name == "starting policy: weights"


@pytest.mark.parametrize(
    ("old", "new", "result"),
    [
        ("content['text']", "content['text'] | lower", "does not show the assistant's turn as it is"),
        ("messages %}", "messages if message['role'] != 'assistant' %}", "does not show the assistant's turn"),
        ("if add_generation_prompt", "if false", "before the assistant's turn"),
    ],
)
def test_a_template_keeps_the_policys_own_turns(
    old: str, new: str, result: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge writes nothing that is trained."""
    next(family for family in FAMILIES if family.name == "llava-qwen2").build(tmp_path / "a")
    path = tmp_path / "a" / "chat_template.jinja"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    code, table = run_doctor(capsys, tmp_path / "a")
    assert (code, table["chat template"][0]) == (1, "**FAIL**")
    assert result in table["chat template"][2]
    assert "copy chat_template.jinja" in table["chat template"][3]
    assert run_doctor(capsys, tmp_path / "a", "--as", "judge", "--no-generate")[0] == 0


def test_a_picture_that_a_processor_refuses_is_named(tmp_path: Path) -> None:
    """Qwen2-VL takes no picture whose sides differ by a factor of 200 or more."""
    if not families.has_torchvision():
        pytest.skip("its processor needs torchvision; `make test-families` has it")
    next(family for family in FAMILIES if family.name == "qwen2-vl").build(tmp_path / "a")
    Image.new("RGB", (500, 1)).save(tmp_path / "thin.png")
    conversation = (Turn("user", "Is it normal?", (ImageView(str(tmp_path / "thin.png"), "0" * 64),)),)
    model = VisionLanguageModel(tmp_path / "a")
    with pytest.raises(InvalidImage, match=r"thin\.png \(500 x 1 pixels\): .* must be smaller than 200, got 500"):
        model.p_yes([conversation])


def test_a_judge_needs_yes_and_no(folder: Path) -> None:
    spell_yes_and_no(folder)
    spec = PreflightConfig.model_validate({"judge": {"judges": [{"name": "a", "path": str(folder)}]}}).judge.judges[0]
    with pytest.raises(UnsupportedCheckpoint, match="no single token for 'yes'"):
        load_judge(spec)
    unload_models()


def test_a_policy_of_written_regions_needs_no_yes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spell_yes_and_no(folder)
    code, table = run_doctor(capsys, folder, "--set", "propose.grounders={written: 4}")
    assert code == 0
    assert table["yes and no"][2] == "none, and none is needed: regions come from written"


def test_what_is_no_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, table = run_doctor(capsys, Path("google/medgemma-4b-it"))
    assert code == 1
    assert "is not a folder on this machine" in table["files"][2]
    assert "hf download google/medgemma-4b-it" in table["files"][3]


def build_idefics2(folder: Path) -> None:
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Processor
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    tokenizer = families.build_llama_tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>")
    vision = families.get_clip_config()
    del vision["model_type"]
    config = Idefics2Config(
        vision_config=vision,
        text_config=families.get_text_config(tokenizer, "mistral"),
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "num_key_value_heads": 1,
            "resampler_head_dim": 16,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    processor = Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=families.IDEFICS3)
    families._save(folder, Idefics2ForConditionalGeneration, config, processor, [tokenizer.eos_token_id])


def build_gemma3n(folder: Path) -> None:
    """Config and processor; the weights are not read before these."""
    from transformers import Gemma3nAudioFeatureExtractor, Gemma3nConfig, Gemma3nProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    names = {
        "image_token": "<image_soft_token>",
        "audio_token": "<audio_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "boa_token": "<start_of_audio>",
        "eoa_token": "<end_of_audio>",
    }
    tokenizer = families._reload(families.build_gemma_tokenizer(*names.values()), extra_special_tokens=names)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(),
        images,
        tokenizer,
        chat_template=families.GEMMA3,  # type: ignore[no-untyped-call]
    )
    processor.save_pretrained(folder)
    Gemma3nConfig().save_pretrained(folder)


@pytest.mark.parametrize("build", [build_idefics2, build_gemma3n])
def test_families_of_the_older_processors(build: Damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both ended in an AttributeError."""
    build(tmp_path / "old")
    with pytest.raises(UnsupportedCheckpoint, match="does not report which text it makes of a picture"):
        load_checkpoint(str(tmp_path / "old"))
    code, table = run_doctor(capsys, tmp_path / "old")
    assert code == 1
    assert "tested families" in table["processor" if "processor" in table else "config class"][3]


# --- torchvision


def test_a_missing_torchvision_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr("clincot.models.inspection.load_processor", fail)
    monkeypatch.setattr("clincot.models.inspection.find_spec", lambda name: None)
    with pytest.raises(
        UnsupportedCheckpoint, match="needs torchvision, which is not installed here; run `pip"
    ) as caught:
        load_checkpoint(str(folder))
    assert find_torchvision_command() in str(caught.value)


def test_a_torchvision_of_another_torch_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("clincot.models.inspection.load_processor", fail)
    monkeypatch.setattr("clincot.models.inspection.find_spec", lambda name: object())
    with pytest.raises(UnsupportedCheckpoint, match=r"does not work with torch \S+ \(operator torchvision::nms"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ("2.13.0", 'pip install "torch==2.13.0" "torchvision==0.28.*"'),
        ("2.0.1", 'pip install "torch==2.0.1" "torchvision==0.15.*"'),
        (
            "2.13.0+cpu",
            'pip install "torch==2.13.0" "torchvision==0.28.*" --index-url https://download.pytorch.org/whl/cpu',
        ),
    ],
)
def test_the_torchvision_that_fits_torch(release: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clincot.models.inspection.version", lambda name: release)
    assert find_torchvision_command() == command


# --- memory

SEVEN_BILLION = ModelSize(
    total=7_000_000_000,
    vision=300_000_000,
    connector=20_000_000,
    lora_per_rank=(2_000_000, 10_000, 100_000),
    layers=32,
    hidden=4096,
    intermediate=11008,
    kv_width=8192,
)


def test_full_finetuning_needs_sixteen_bytes_a_weight() -> None:
    """All parts trained, float32: 4 for the weight, 4 for its gradient, 8 for Adam [ZeRO]."""
    train = TrainConfig(dtype="float32", freeze_vision=False, batch_size=1)
    method = gpu_memory.TrainingMethod(rank=0, bfloat16=False, four_bit=False)
    parts = dict(gpu_memory.estimate_training(SEVEN_BILLION, train, tokens=1000, method=method).parts)
    assert sum(parts[name] for name in ("weights", "gradients", "Adam")) == 16 * 7e9
    # 2 conversations of 1000 tokens: the inputs of 32 layers at 4 bytes, and all of one layer at 68
    assert parts["activations"] == 2 * 1000 * 4096 * (32 * 4 + 68)


def test_a_lora_trains_its_own_weights_only() -> None:
    train = TrainConfig(dtype="bfloat16", lora_r=128, freeze_vision=False, batch_size=1)
    parts = dict(gpu_memory.estimate_training(SEVEN_BILLION, train, tokens=1000).parts)
    adapters = 128 * (2_000_000 + 10_000 + 100_000)
    assert parts["weights"] == 2 * 7e9
    assert (parts["adapters"], parts["gradients"], parts["Adam"]) == (4 * adapters, 4 * adapters, 8 * adapters)


def test_serving_counts_keys_and_values() -> None:
    parts = dict(gpu_memory.estimate_serving(SEVEN_BILLION, tokens=1000, batch=16).parts)
    assert parts["weights"] == 14e9
    assert parts["keys and values"] == 16 * 1000 * 32 * 8192 * 2


def test_sizes_are_those_of_the_weights(sound: Path) -> None:
    model, _ = load_checkpoint(str(sound))
    size = measure_model(model.config)
    assert size.total == model.num_parameters()
    assert size.vision == sum(weight.numel() for weight in model.model.vision_tower.parameters())
    assert size.connector == sum(weight.numel() for weight in model.model.multi_modal_projector.parameters())
    # 2 layers, hidden 32, keys and values of 1 head of 16, MLP 64: in + out of q, k, v, o and of gate, up, down
    assert size.lora_per_rank[0] == 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert (size.layers, size.hidden, size.intermediate, size.kv_width) == (2, 32, 64, 2 * 16)


@pytest.mark.parametrize(
    ("gpu", "remedy"),
    [
        (48.0, "--set train.full_finetuning=false train.lora_r=128 train.dtype=bfloat16 train.batch_size=32"),
        (24.0, "--set train.full_finetuning=false train.lora_r=128 train.dtype=bfloat16 train.batch_size=4"),
        (8.0, "shard the model over several"),
    ],
)
def test_what_would_fit_is_suggested(gpu: float, remedy: str) -> None:
    everything = TrainConfig(full_finetuning=True, dtype="float32")
    options = doctor.DoctorOptions(train=everything, gpu_gib=gpu)
    checkup = doctor._Checkup(Path("seven-billion"), options, tokens=840, size=SEVEN_BILLION)
    check = doctor._check_training_memory(checkup)
    assert check.state == "fail"
    assert f"of the GPU's {gpu:g} GiB can be used" in check.result
    assert remedy in check.remedy
    fitting = doctor._check_training_memory(replace(checkup, options=replace(options, gpu_gib=300.0)))
    assert fitting.state == "pass"
