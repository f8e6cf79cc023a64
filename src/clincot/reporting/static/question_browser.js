// The questions of a run: search, filters, sorting and pages over the rows; details are loaded when a row is opened.
"use strict";

const clincot = (() => {
  const PAGE_SIZE = 50;
  const COLORS = ["#3fa7d6", "#f2a541", "#59cd90", "#ee6c9b", "#b388eb", "#e2c64a", "#8ad3c4", "#ff7b54"];
  const FILTERS = ["search", "source", "topic", "modality", "result", "gap", "agreement", "sort"];
  const at = (id) => document.getElementById(id);
  const details = new Map(); // number of a file -> promise of its rows
  const waiting = new Map(); // number of a file -> function that takes its rows
  let facts = null, rows = [], found = [], page = 0, current = -1;

  // Text is only ever set as textContent, so that nothing in the data can become markup.
  function make(tag, text = "", attributes = {}) {
    const node = document.createElement(tag);
    node.textContent = text;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  }

  function makeShape(tag, attributes) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  }

  const format = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));
  const count = (number) => number.toLocaleString("en");

  function setRows(information, content) {
    facts = information;
    rows = content.map((values, number) => {
      const row = Object.fromEntries(facts.columns.map((name, column) => [name, values[column]]));
      row.number = number;
      row.words = [row.text, row.topic, ...row.answers].join("\n").toLowerCase();
      return row;
    });
    document.title = facts.title;
    at("title").textContent = facts.title;
    for (const name of ["source", "topic", "modality"]) {
      const values = [...new Set(rows.map((row) => row[name]))].filter((value) => value !== "").sort();
      fillSelect(name, ["", ...values].map((value) => [value, value || "all"]));
    }
    const results = [["", "all"]];
    for (const policy of facts.policies) {
      results.push([`${policy}=right`, `${policy}: right`], [`${policy}=wrong`, `${policy}: wrong`]);
      results.push([`${policy}=unscored`, `${policy}: not scored`]);
    }
    if (facts.policies.length > 1) {
      const [first, last] = [facts.policies[0], facts.policies.at(-1)];
      results.push(["won", `wrong in ${first}, right in ${last}`], ["lost", `right in ${first}, wrong in ${last}`]);
    }
    fillSelect("result", results);
    readAddress();
  }

  function fillSelect(name, options) {
    at(name).replaceChildren(...options.map(([value, label]) => make("option", label, { value })));
  }

  // The state is in the address, so that a selection can be bookmarked and sent.
  function readAddress() {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const name of FILTERS) at(name).value = state.get(name) || "";
    select();
    page = Math.min(Math.max(0, Number(state.get("page") || 1) - 1), countPages() - 1);
    drawRows();
    const opened = rows.findIndex((row) => row.id === state.get("open") && row.source === state.get("in"));
    if (opened >= 0) open(rows[opened]);
    else close();
  }

  function writeAddress() {
    const state = new URLSearchParams();
    for (const name of FILTERS) if (at(name).value) state.set(name, at(name).value);
    if (page) state.set("page", page + 1);
    const row = rows[current];
    if (row && !at("detail").hidden) {
      state.set("open", row.id);
      state.set("in", row.source);
    }
    history.replaceState(null, "", `#${state}`);
  }

  function hasResult(row, wanted) {
    if (!row.results) return false;
    const [first, last] = [facts.policies[0], facts.policies.at(-1)].map((policy) => row.results[policy]);
    if (wanted === "won") return first === false && last === true;
    if (wanted === "lost") return first === true && last === false;
    const cut = wanted.lastIndexOf("=");
    const correct = row.results[wanted.slice(0, cut)];
    return correct === { right: true, wrong: false, unscored: null }[wanted.slice(cut + 1)];
  }

  function select() {
    const words = (at("search").value.toLowerCase().match(/"[^"]+"|\S+/g) || []).map((word) => word.replaceAll('"', ""));
    const gap = at("gap").value === "" ? null : Number(at("gap").value);
    const agreement = at("agreement").value, result = at("result").value;
    const exact = ["source", "topic", "modality"].filter((name) => at(name).value !== "");
    found = rows.filter((row) =>
      words.every((word) => (word.startsWith("question-") ? row.id.startsWith(word) : row.words.includes(word))) &&
      exact.every((name) => row[name] === at(name).value) &&
      (gap === null || (row.gap !== null && row.gap >= gap)) &&
      (!agreement || (row.spread !== null && (agreement === "agree" ? row.spread < 0.1 : row.spread >= 0.2))) &&
      (!result || hasResult(row, result)));
    const sort = at("sort").value, name = sort.replace("-", ""), sign = sort.startsWith("-") ? 1 : -1;
    if (name === "text") found.sort((a, b) => a.text.localeCompare(b.text) || a.number - b.number);
    else if (name) {
      // Rows without a value come last in either direction.
      const missing = (row) => Number(row[name] === null);
      found.sort((a, b) => missing(a) - missing(b) || sign * (a[name] - b[name]) || a.number - b.number);
    }
    page = 0;
  }

  const countPages = () => Math.max(1, Math.ceil(found.length / PAGE_SIZE));
  const listPage = () => found.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);

  function drawRows() {
    at("count").textContent = `${count(found.length)} of ${count(rows.length)} questions`;
    at("page").textContent = `Page ${page + 1} of ${countPages()}`;
    at("previous").disabled = page === 0;
    at("next").disabled = page + 1 >= countPages();
    at("rows").replaceChildren(...listPage().map(drawRow));
  }

  function drawRow(row) {
    const line = make("tr", "", { "data-row": row.number, "aria-current": row.number === current });
    const cell = make("td");
    const button = make("button", row.text, { type: "button" });
    button.addEventListener("click", () => open(row));
    cell.append(button);
    line.append(cell);
    for (const value of [row.source, row.topic, row.modality, format(row.gap), format(row.spread)]) {
      line.append(make("td", value));
    }
    const result = make("td");
    for (const [policy, correct] of Object.entries(row.results || {})) result.append(drawMark(correct, policy), " ");
    line.append(result);
    return line;
  }

  function drawMark(correct, policy) {
    if (correct === null) return make("span", "–", { class: "muted", title: `${policy}: not scored` });
    const word = correct ? "right" : "wrong";
    return make("span", correct ? "✓" : "✗", { class: word, title: `${policy}: ${word}`, "aria-label": `${policy}: ${word}` });
  }

  function loadDetails(number) {
    if (!details.has(number)) {
      details.set(number, new Promise((take, fail) => {
        waiting.set(number, take);
        const script = make("script", "", { src: `data/details-${String(number).padStart(5, "0")}.js` });
        script.addEventListener("error", () => {
          details.delete(number);
          fail(new Error(`${script.getAttribute("src")} could not be loaded`));
        });
        document.head.append(script);
      }));
    }
    return details.get(number);
  }

  function addDetails(number, content) {
    waiting.get(number)(content);
  }

  async function open(row) {
    current = row.number;
    const position = found.indexOf(row);
    if (position >= 0 && Math.floor(position / PAGE_SIZE) !== page) page = Math.floor(position / PAGE_SIZE);
    drawRows();
    const panel = at("detail");
    panel.hidden = false;
    panel.setAttribute("aria-busy", "true");
    writeAddress();
    document.querySelector("tr[aria-current=true]")?.scrollIntoView({ block: "nearest" });
    let content;
    try {
      const file = await loadDetails(Math.floor(row.number / facts.size));
      content = drawDetail(row, file[row.number % facts.size]);
    } catch (error) {
      content = [make("h2", row.text), make("p", error.message, { class: "wrong", role: "alert" })];
    }
    if (current !== row.number) return; // another row has been opened in the meantime
    panel.replaceChildren(...content);
    panel.removeAttribute("aria-busy");
  }

  function drawDetail(row, detail) {
    const parts = [make("h2", row.text)];
    parts.push(make("p", [row.source, row.kind, row.topic, row.modality].filter(Boolean).join(" · "), { class: "small" }));
    const shown = detail.candidates || detail.outcomes;
    const boxes = shown.map((one, number) => [one.box, COLORS[number % COLORS.length], false]);
    for (const box of detail.key?.boxes || []) boxes.push([box, "#ffffff", true]);
    parts.push(drawFilm(detail.film, boxes, row.text));
    if (detail.key) parts.push(make("p", `Answer key: ${detail.key.answer}`));
    const list = make("ol");
    shown.forEach((one, number) => list.append(detail.key ? drawOutcome(one, number) : drawCandidate(one, number)));
    parts.push(list);
    if (detail.pairs?.length) {
      parts.push(make("h3", "Pairs"));
      const numbers = new Map(detail.candidates.map((one, number) => [one.id, number + 1]));
      const pairs = make("ul");
      for (const pair of detail.pairs) {
        const [better, worse] = [pair.chosen, pair.rejected].map((id) => numbers.get(id) ?? id);
        pairs.append(make("li", `${better} over ${worse}, gap ${format(pair.gap)}`));
      }
      parts.push(pairs);
    }
    parts.push(make("code", `clincot show ${row.id}`));
    return parts;
  }

  function drawFilm([name, width, height], boxes, text) {
    const label = `Image of the question ${text}, with ${boxes.filter(([box]) => box).length} regions`;
    const film = makeShape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    film.append(makeShape("image", { href: `films/${name}`, width, height }));
    for (const [box, color, dashed] of boxes) {
      if (!box) continue;
      const [x0, y0, x1, y1] = box;
      const place = { x: x0 * width, y: y0 * height, width: (x1 - x0) * width, height: (y1 - y0) * height };
      film.append(makeShape("rect", { ...place, stroke: color, ...(dashed ? { "stroke-dasharray": "6 4" } : {}) }));
    }
    return film;
  }

  function drawAnswer(text, number) {
    const item = make("li");
    const swatch = make("i", "", { class: "swatch" });
    swatch.style.background = COLORS[number % COLORS.length];
    item.append(swatch, make("b", text.trim() ? `“${text}” ` : "(an empty answer) "));
    return item;
  }

  function drawCandidate(one, number) {
    const item = drawAnswer(one.text, number);
    item.append(make("span", one.score === null ? `unscored: ${one.reason}` : `${format(one.score)} ± ${format(one.spread)}`));
    const judges = one.judges.map(([name, score, reason]) => `${name} ${score === null ? reason : format(score)}`);
    const region = `${one.hypothesis} (${one.grounder})${one.step ? `, step ${one.step}` : ""}`;
    item.append(make("div", [region, ...judges].join(" · "), { class: "small" }));
    return item;
  }

  function drawOutcome(one, number) {
    const item = drawAnswer(one.text, number);
    item.append(drawMark(one.correct, one.policy));
    const facts = [one.policy];
    if (one.hit !== null) facts.push(one.hit ? "hit" : "miss");
    if (one.iou !== null) facts.push(`IoU ${format(one.iou)}`);
    if (one.off_format) facts.push("off format");
    item.append(make("div", facts.join(" · "), { class: "small" }));
    return item;
  }

  function close() {
    at("detail").hidden = true;
    at("detail").replaceChildren();
    writeAddress();
  }

  function turnPage(step) {
    const target = page + step;
    if (target < 0 || target >= countPages()) return;
    page = target;
    drawRows();
    writeAddress();
  }

  function move(step) {
    const position = found.findIndex((row) => row.number === current);
    const target = position < 0 ? page * PAGE_SIZE : position + step;
    if (target >= 0 && target < found.length) open(found[target]);
  }

  const KEYS = {
    "/": () => at("search").focus(),
    j: () => move(1),
    k: () => move(-1),
    n: () => turnPage(1),
    p: () => turnPage(-1),
    Escape: close,
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input, select");
    if (typing && event.key === "Escape") event.target.blur();
    if (typing || !(event.key in KEYS)) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  let timer = 0;
  const apply = () => {
    select();
    drawRows();
    writeAddress();
  };
  at("controls").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(apply, 120);
  });
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("controls").addEventListener("reset", () => setTimeout(apply, 0));
  at("previous").addEventListener("click", () => turnPage(-1));
  at("next").addEventListener("click", () => turnPage(1));
  window.addEventListener("hashchange", readAddress);
  return { setRows, addDetails };
})();
