"use strict";
// A rater answers every question of every pair, in an order that differs between raters. The answers are a
// stack: their number determines the next question, and undo removes the last one.

const study = JSON.parse(document.getElementById("study").textContent);
const $ = (id) => document.getElementById(id);
const STORE = `hyperalign-study:${study.id}`;
const PER_PAIR = study.questions.length;
const ALL = study.trials.length * PER_PAIR;
const STACKED = matchMedia("(max-aspect-ratio: 4/5)"); // as in page.css
const ANSWERS = { 1: "first", ArrowLeft: "first", 2: "second", ArrowRight: "second", 0: "tie" };
const STACKED_ANSWERS = { ArrowUp: "first", ArrowDown: "second" };
const FLASH_MS = 220;
const LONG_PROMPT = 100; // characters
const SECONDS_EACH = 5;

let state = { rater: newRater(), name: "", answers: [] };
let order = orderOf(state.rater);
let ready = false; // both images of the pair are shown
let zoomedSide = 0;

function newRater() {
  return Array.from(crypto.getRandomValues(new Uint8Array(6)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// The trials shuffled by a generator seeded with study and rater, so that a resumed study keeps its order.
function orderOf(rater) {
  let seed = 2166136261;
  for (const letter of study.id + rater) seed = Math.imul(seed ^ letter.charCodeAt(0), 16777619);
  const random = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let bits = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    bits = (bits + Math.imul(bits ^ (bits >>> 7), 61 | bits)) ^ bits;
    return ((bits ^ (bits >>> 14)) >>> 0) / 4294967296;
  };
  const shuffled = [...study.trials];
  for (let last = shuffled.length - 1; last > 0; last--) {
    const chosen = Math.floor(random() * (last + 1));
    [shuffled[last], shuffled[chosen]] = [shuffled[chosen], shuffled[last]];
  }
  return shuffled;
}

const trialAt = (step) => order[Math.floor(step / PER_PAIR)];

// --- storage

function store() {
  try {
    localStorage.setItem(STORE, JSON.stringify(votes()));
  } catch {
    notify("This browser cannot store your answers: save your votes before you close the page.");
  }
}

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORE));
  } catch {
    return null;
  }
}

function clearStored() {
  try {
    localStorage.removeItem(STORE);
  } catch {
    // a browser without storage has stored nothing
  }
}

function votes() {
  const found = {};
  state.answers.forEach((answer, step) => {
    (found[trialAt(step).id] ??= {})[study.questions[step % PER_PAIR].key] = answer;
  });
  return { format: "hyperalign-votes", version: 1, study: study.id, rater: state.rater, name: state.name, votes: found };
}

function loadVotes(file) {
  if (file?.format !== "hyperalign-votes" || typeof file.rater !== "string" || typeof file.votes !== "object") {
    throw new Error("This is not a file of votes. Choose a .json file that Save wrote.");
  }
  if (file.study !== study.id) {
    throw new Error(`These votes belong to the study ${file.study}, and this is the study ${study.id}.`);
  }
  state = { rater: file.rater, name: String(file.name ?? ""), answers: [] };
  order = orderOf(state.rater);
  for (let step = 0; step < ALL; step++) {
    const answer = file.votes[trialAt(step).id]?.[study.questions[step % PER_PAIR].key];
    if (!Object.values(ANSWERS).includes(answer)) break;
    state.answers.push(answer);
  }
}

function save() {
  if (!state.answers.length) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(votes(), null, 1)], { type: "application/json" }));
  link.download = `votes-${study.id}-${state.rater}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  announce(`Saved ${state.answers.length} answers as ${link.download}.`);
}

// --- display

function notify(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

const announce = (text) => ($("status").textContent = text);

const loaded = new Map();

function load(index) {
  if (!loaded.has(index)) {
    const image = new Image();
    image.src = study.images[index];
    loaded.set(index, image.decode().then(() => image));
  }
  return loaded.get(index);
}

function view(name) {
  for (const id of ["start", "trial", "done"]) $(id).hidden = id !== name;
}

async function show() {
  const step = state.answers.length;
  $("progress").max = ALL;
  $("progress").value = step;
  $("undo").disabled = $("save").disabled = !step;
  if (step === ALL) {
    view("done");
    announce("All pairs are answered. Save your votes.");
    $("save-all").focus();
    return;
  }
  view("trial");
  const trial = trialAt(step), question = study.questions[step % PER_PAIR];
  $("prompt").textContent = trial.prompt;
  $("prompt").hidden = !trial.prompt;
  $("prompt").classList.toggle("long", trial.prompt.length > LONG_PROMPT);
  $("prompt").tabIndex = $("prompt").scrollHeight > $("prompt").clientHeight ? 0 : -1;
  const pair = Math.floor(step / PER_PAIR) + 1;
  $("count").textContent = `Pair ${pair} of ${study.trials.length} · question ${(step % PER_PAIR) + 1} of ${PER_PAIR}`;
  $("question").textContent = question.text;
  $("question").classList.remove("new");
  void $("question").offsetWidth; // restarts the animation
  $("question").classList.add("new");
  announce(`${$("count").textContent}. ${question.text}${trial.prompt ? ` ${trial.prompt}` : ""}`);
  if ($("trial").dataset.trial !== trial.id) await showPair(trial, step);
}

async function showPair(trial, step) {
  ready = false;
  $("trial").dataset.trial = trial.id;
  const images = await Promise.all(trial.images.map(load));
  if ($("trial").dataset.trial !== trial.id) return;
  for (const [side, button] of document.querySelectorAll(".image").entries()) {
    button.querySelector("img")?.remove();
    images[side].alt = side ? "Second image" : "First image";
    button.append(images[side]);
  }
  ready = true;
  const ahead = trialAt(step - (step % PER_PAIR) + PER_PAIR)?.images ?? [];
  for (const index of [...loaded.keys()]) if (![...trial.images, ...ahead].includes(index)) loaded.delete(index);
  ahead.forEach(load);
}

// --- actions of the rater

function answer(choice) {
  if (!ready || state.answers.length === ALL) return;
  state.answers.push(choice);
  store();
  const picked = document.querySelectorAll(".image")[{ first: 0, second: 1 }[choice]];
  picked?.classList.add("picked");
  setTimeout(() => picked?.classList.remove("picked"), FLASH_MS);
  show();
}

function undo() {
  if (!state.answers.length) return;
  state.answers.pop();
  store();
  show();
}

function begin() {
  notify("");
  store();
  show();
  $("question").focus();
}

function zoom(side) {
  if (!ready) return;
  zoomedSide = side;
  const image = document.querySelectorAll(".image img")[side];
  $("zoom-title").textContent = image.alt;
  $("zoomed").replaceChildren(image.cloneNode());
  if (!$("zoom").open) $("zoom").showModal();
}

function nextPerson() {
  if (!confirm("Are your votes saved? The page deletes them and starts again.")) return;
  state = { rater: newRater(), name: "", answers: [] };
  order = orderOf(state.rater);
  clearStored();
  delete $("trial").dataset.trial;
  $("name").value = "";
  welcome();
}

function welcome() {
  const minutes = Math.round((ALL * SECONDS_EACH) / 60);
  const time = minutes > 1 ? `about ${minutes} minutes` : "a minute";
  $("size").textContent =
    `${study.trials.length} pairs, ${PER_PAIR} questions on each, ${time} in all. The questions on every pair:`;
  $("questions").replaceChildren(...study.questions.map((question) => {
    const item = document.createElement("li");
    item.textContent = question.text;
    return item;
  }));
  $("progress").value = 0;
  $("undo").disabled = $("save").disabled = true;
  view("start");
  $("name").focus();
}

function pressed(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if ((event.ctrlKey || event.metaKey) && key === "z" && event.target.tagName !== "INPUT") return undo();
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.tagName === "INPUT") return;
  if ($("zoom").open) {
    if (key === "z") $("zoom").close();
    if (key.startsWith("Arrow")) zoom(1 - zoomedSide);
    if (key.startsWith("Arrow")) event.preventDefault();
    return;
  }
  if ($("help").open) return void ((key === "?" || key === "h") && $("help").close());
  if (key === "?" || key === "h") return $("help").showModal();
  if (key === "s") return save();
  if (key === "u" || key === "Backspace") return undo();
  if ($("trial").hidden) return;
  if (key === "z") return zoom(0);
  if (event.target === $("prompt") && key.startsWith("Arrow")) return;
  const choice = ANSWERS[key] ?? (STACKED.matches ? STACKED_ANSWERS[key] : undefined);
  if (!choice) return;
  event.preventDefault();
  answer(choice);
}

document.addEventListener("keydown", pressed);
for (const button of document.querySelectorAll("[data-answer]")) button.onclick = () => answer(button.dataset.answer);
for (const button of document.querySelectorAll(".image")) button.onclick = () => zoom(Number(button.dataset.side));
$("undo").onclick = undo;
$("save").onclick = $("save-all").onclick = save;
$("open-help").onclick = () => $("help").showModal();
$("switch").onclick = () => zoom(1 - zoomedSide);
$("next-person").onclick = nextPerson;
$("begin").onsubmit = (event) => {
  event.preventDefault();
  state.name = $("name").value.trim();
  begin();
};
$("import").onchange = async () => {
  try {
    loadVotes(JSON.parse(await $("import").files[0].text()));
    begin();
  } catch (error) {
    notify(error instanceof SyntaxError ? "This file is not JSON. Choose a file that Save wrote." : error.message);
  }
  $("import").value = "";
};

try {
  loadVotes(stored());
  show();
} catch {
  welcome();
}
