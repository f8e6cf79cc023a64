// The page at /: one question about an image, answered by a streamed chat completion of the same server. Further images
// can be added if the server allows several (max_images); boxes are of the first one.
"use strict";

const COLOURS = ["#62c3ff", "#ffb454", "#7ee787", "#ff7b9c", "#c9a5ff", "#f2e55c", "#5fe3d0", "#ff9d7a"];
const get = (id) => document.getElementById(id);
let chosen = null; // the file
let further = []; // images besides it, each with its file and the input of its role
let preview = ""; // object URL of the file, if the browser can show it

function choose(file) {
  if (!file) return;
  chosen = file;
  URL.revokeObjectURL(preview);
  preview = URL.createObjectURL(file);
  get("name").textContent = file.name;
  get("result").hidden = true;
  get("boxes").replaceChildren();
  get("image").onload = () => showPicture(true);
  get("image").onerror = () => showPicture(false); // a DICOM file; the server returns its picture
  get("image").src = preview;
}

function showPicture(shown) {
  get("picture").hidden = !shown;
  get("hint").hidden = shown;
  if (!shown) get("hint").textContent = "The picture is shown with the answer.";
}

function addFurther(files) {
  for (const file of files) {
    const image = { file, role: document.createElement("input") };
    image.role.placeholder = "role";
    image.role.ariaLabel = `Role of ${file.name}`;
    image.role.maxLength = 40;
    image.role.setAttribute("list", "roles");
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Remove" });
    const item = document.createElement("li");
    item.append(Object.assign(document.createElement("span"), { textContent: file.name }), image.role, remove);
    remove.addEventListener("click", () => {
      further = further.filter((other) => other !== image);
      item.remove();
    });
    further.push(image);
    get("further").append(item);
  }
  get("add").value = ""; // so that the same file can be chosen again after it was removed
}

function encode(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve("data:application/octet-stream;base64," + reader.result.split(",")[1]);
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(file);
  });
}

async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) if (event !== "data: [DONE]") yield JSON.parse(event.slice("data: ".length));
  }
}

function describeError(body, status) {
  const error = body?.error;
  return error?.message ?? error ?? `The server replied with status ${status}.`;
}

async function ask(event) {
  event.preventDefault();
  if (!chosen) return showStatus("Choose an image first.", true);
  get("ask").disabled = true;
  get("answer").hidden = true;
  get("hypotheses").replaceChildren();
  drawRegions([], -1);
  showStatus("The model looks for regions …");
  try {
    const content = [];
    for (const file of [chosen, ...further.map((image) => image.file)]) {
      content.push({ type: "image_url", image_url: { url: await encode(file) } });
    }
    content.push({ type: "text", text: get("question").value });
    // without a role an image has its number, as at the server; roles are sent for all of them or for none
    const roles = further.map((image, position) => image.role.value.trim() || `image ${position + 2}`);
    const reply = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model: get("model").textContent,
        messages: [{ role: "user", content }],
        stream: true,
        clincot: { return_image: true, roles },
      }),
    });
    if (!reply.ok) throw new Error(describeError(await reply.json().catch(() => null), reply.status));
    let refusal = "";
    for await (const chunk of readEvents(reply.body)) {
      if (chunk.error) throw new Error(describeError(chunk, 200));
      refusal += chunk.choices[0]?.delta.refusal ?? "";
      if (chunk.clincot) showChain(chunk.clincot, refusal);
    }
  } catch (error) {
    showStatus(error.message, true);
  } finally {
    get("ask").disabled = false;
  }
}

function showStatus(text, failed = false) {
  get("result").hidden = false;
  get("status").textContent = text;
  get("status").hidden = !text;
  get("status").classList.toggle("error", failed);
}

// The first chunk has hypotheses and regions, the last one the answers as well.
function showChain(chain, refusal) {
  const answered = chain.answer !== undefined;
  const items = chain.hypotheses.map((text) => Object.assign(document.createElement("li"), { textContent: text }));
  get("hypotheses").replaceChildren(...items);
  if (chain.image) get("image").src = chain.image;
  drawRegions(chain.regions, answered ? chain.winner : -1);
  if (!answered) return showStatus("The model answers from each region …");
  showStatus("");
  get("answer").hidden = false;
  get("text").textContent = chain.abstained ? "No answer" : chain.answer;
  get("reason").hidden = !refusal;
  get("reason").textContent = refusal;
  get("confidence").value = chain.confidence;
  get("percent").textContent = formatPercent(chain.confidence);
  const agreeing = Math.round(chain.agreement * chain.regions.length);
  const which = chain.abstained ? "the answer that is withheld" : "this answer";
  get("compared").hidden = !chain.others?.length;
  get("compared").textContent = `Seen beside the image: ${chain.others?.join(", ")}.`;
  get("agreement").textContent = `${agreeing} of ${chain.regions.length} regions gave ${which}.`;
}

function drawRegions(regions, winner) {
  const boxes = regions.map((region, position) => {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const { x0, y0, x1, y1 } = region.box;
    const shape = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
    for (const [name, value] of Object.entries(shape)) rect.setAttribute(name, 100 * value);
    rect.setAttribute("stroke", COLOURS[position % COLOURS.length]);
    rect.setAttribute("color", COLOURS[position % COLOURS.length]);
    rect.classList.toggle("winner", position === winner);
    return rect;
  });
  get("boxes").replaceChildren(...boxes);
  get("regions").replaceChildren(...regions.map((region, position) => describeRegion(region, position, winner)));
}

function describeRegion(region, position, winner) {
  const item = document.createElement("li");
  item.style.color = COLOURS[position % COLOURS.length];
  item.tabIndex = 0;
  item.classList.toggle("winner", position === winner);
  const answer = document.createElement("b");
  answer.textContent = region.answer === undefined ? "…" : region.answer || "(no answer)";
  const place = document.createElement("small");
  const source = region.grounder === "whole" ? "the whole image" : `${region.hypothesis}, by ${region.grounder}`;
  const likelihood = region.likelihood === undefined ? "" : ` · probability ${formatPercent(region.likelihood)}`;
  place.textContent = source + likelihood + (region.cut_off ? " · cut off" : "");
  item.append(answer, place);
  for (const name of ["mouseenter", "focus", "click"]) item.addEventListener(name, () => pickRegion(position));
  for (const name of ["mouseleave", "blur"]) item.addEventListener(name, () => pickRegion(-1));
  return item;
}

function pickRegion(picked) {
  get("boxes").classList.toggle("picked", picked >= 0);
  [...get("boxes").children].forEach((rect, position) => rect.classList.toggle("picked", position === picked));
}

const formatPercent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;

async function start() {
  get("form").addEventListener("submit", ask);
  get("file").addEventListener("change", () => choose(get("file").files[0]));
  get("add").addEventListener("change", () => addFurther(get("add").files));
  for (const name of ["dragover", "dragleave", "drop"]) {
    get("drop").addEventListener(name, (event) => {
      event.preventDefault();
      get("drop").classList.toggle("over", name === "dragover");
      if (name === "drop") choose(event.dataTransfer.files[0]);
    });
  }
  const models = await fetch("v1/models").then((reply) => reply.json());
  get("model").textContent = models.data[0].id;
  const model = await fetch(`v2/models/${encodeURIComponent(models.data[0].id)}`).then((reply) => reply.json());
  get("others").hidden = !model.inputs.some((tensor) => tensor.name === "other_images");
}

start().catch(() => showStatus("The server does not reply.", true));
