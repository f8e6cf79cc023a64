"""Tasks for Label Studio, and the annotations that it exports.

Formats (Label Studio 1.23): a list of tasks `{"data": …, "predictions": […]}` is imported; the export `JSON` is the
same list with `annotations`, each with the `result` of the controls and `completed_by`. Regions are rectangles in
percent of the image (https://labelstud.io/guide/predictions). They are predictions, so readers can move or remove them
without consequence; only the choices are read back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from clincot.clients.http import encode_png_base64
from clincot.errors import InvalidInput
from clincot.geometry import WHOLE_IMAGE, Box
from clincot.images import load_cached_view
from clincot.jsonl import read_json
from clincot.judging.people_verdicts import ReaderVerdict
from clincot.judging.review_queue import ReviewItem
from clincot.records import Study

MAX_SIDE_PX = 1280  # of a picture inside a task

LABELING_CONFIG = """\
<View>
  <Header value="$question"/>
  <View style="display: flex; gap: 24px; flex-wrap: wrap">
    <View style="flex: 3 1 420px">
      <Image name="image" value="$image" zoom="true" zoomControl="true" brightnessControl="true"
             contrastControl="true"/>
      <RectangleLabels name="regions" toName="image" opacity="0.1" strokeWidth="3">
        <Label value="A" background="#0072b2"/>
        <Label value="B" background="#d55e00"/>
      </RectangleLabels>
    </View>
    <View style="flex: 2 1 300px">
      <Header value="Answer A"/>
      <Text name="answer_a" value="$answer_a"/>
      <Choices name="a" toName="image" choice="single" showInline="true" required="true"
               requiredMessage="Is answer A right?">
        <Choice value="A is right"/><Choice value="A is wrong"/><Choice value="A: unsure"/>
      </Choices>
      <Header value="Answer B"/>
      <Text name="answer_b" value="$answer_b"/>
      <Choices name="b" toName="image" choice="single" showInline="true" required="true"
               requiredMessage="Is answer B right?">
        <Choice value="B is right"/><Choice value="B is wrong"/><Choice value="B: unsure"/>
      </Choices>
      <Header value="Which one is better, answer and region together?"/>
      <Choices name="better" toName="image" choice="single" showInline="true" required="true"
               requiredMessage="Which answer is better?">
        <Choice value="A is better"/><Choice value="B is better"/><Choice value="no difference"/>
      </Choices>
    </View>
  </View>
</View>
"""

# {control: {choice: its meaning}}
_RIGHT_CHOICES: dict[str, dict[str, bool | None]] = {
    "a": {"A is right": True, "A is wrong": False, "A: unsure": None},
    "b": {"B is right": True, "B is wrong": False, "B: unsure": None},
}
_BETTER_CHOICES: dict[str, Literal["a", "b", "equal"]] = {
    "A is better": "a",
    "B is better": "b",
    "no difference": "equal",
}


def build_task(item: ReviewItem, question: str, image: str, answers: dict[str, str], boxes: dict[str, Box]) -> Any:
    """A task for import. image: URL or data URI; answers and boxes: by candidate. The whole image is not drawn."""
    shown = {"A": item.answer_a, "B": item.answer_b}
    regions = [
        _build_rectangle(label, boxes[candidate])
        for label, candidate in shown.items()
        if boxes[candidate] != WHOLE_IMAGE
    ]
    data = {
        "task": item.task,
        "image": image,
        "question": question,
        "answer_a": answers[item.answer_a] or "(an empty answer)",
        "answer_b": answers[item.answer_b] or "(an empty answer)",
    }
    return {"data": data, "predictions": [{"model_version": "regions", "result": regions}] if regions else []}


def _build_rectangle(label: str, box: Box) -> dict[str, Any]:
    value = {
        "x": 100 * box.x0,
        "y": 100 * box.y0,
        "width": 100 * (box.x1 - box.x0),
        "height": 100 * (box.y1 - box.y0),
        "rotation": 0,
        "rectanglelabels": [label],
    }
    return {"id": label, "from_name": "regions", "to_name": "image", "type": "rectanglelabels", "value": value}


def encode_picture(study: Study, folder: Path) -> str:
    """The study's image as a data URI, at most MAX_SIDE_PX on its longest side. Raises InvalidImage."""
    side = None if max(study.width, study.height) <= MAX_SIDE_PX else MAX_SIDE_PX
    view = load_cached_view(folder / study.image, None, side)
    channels = view.split()
    grey = all(channel.tobytes() == channels[0].tobytes() for channel in channels[1:])
    return "data:image/png;base64," + encode_png_base64(channels[0] if grey else view)


class _Result(BaseModel):
    from_name: str = ""  # relations between regions have none
    value: dict[str, Any] = Field(default_factory=dict)


class _Annotation(BaseModel):
    id: int
    completed_by: int | dict[str, Any] | None = None
    was_cancelled: bool = False
    result: list[_Result]


class _TaskData(BaseModel):
    task: Annotated[str, Field(min_length=1)]


class _Task(BaseModel):
    data: _TaskData
    annotations: list[_Annotation]


def read_annotations(path: Path) -> list[ReaderVerdict]:
    """Read an export of the format JSON: the last annotation of each reader and task; skipped tasks are left out.

    Raises InvalidInput naming the task if it is another format, or if a choice is missing or unknown.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise InvalidInput(
            f"{path}: expected Label Studio's export JSON, a list of tasks, got {type(content).__name__}"
        )
    verdicts: dict[tuple[str, str], ReaderVerdict] = {}
    for number, entry in enumerate(content):
        try:
            task = _Task.model_validate(entry)
        except ValueError as error:
            raise InvalidInput(
                f"{path}: task {number}: expected `data.task` and `annotations`, as in Label Studio's export JSON (not "
                f"JSON_MIN or CSV) of tasks that `clincot review export` wrote: {error}"
            ) from None
        for annotation in sorted(task.annotations, key=lambda one: one.id):
            if not annotation.was_cancelled:
                verdict = _read_verdict(task.data.task, annotation, f"{path}: {task.data.task}")
                verdicts[verdict.task, verdict.reader] = verdict
    return list(verdicts.values())


def _read_verdict(task: str, annotation: _Annotation, where: str) -> ReaderVerdict:
    reader = annotation.completed_by
    if isinstance(reader, dict):  # exports may hold the whole user
        reader = reader.get("id") or reader.get("email")
    choices = {result.from_name: result.value.get("choices") for result in annotation.result}

    def read_choice(name: str, meanings: dict[str, Any]) -> Any:
        chosen = choices.get(name)
        if not isinstance(chosen, list) or len(chosen) != 1 or chosen[0] not in meanings:
            raise InvalidInput(f"{where}: annotation {annotation.id}: expected one of {list(meanings)}, got {chosen}")
        return meanings[chosen[0]]

    return ReaderVerdict(
        task=task,
        reader=str(reader),
        a_right=read_choice("a", _RIGHT_CHOICES["a"]),
        b_right=read_choice("b", _RIGHT_CHOICES["b"]),
        better=read_choice("better", _BETTER_CHOICES),
    )
