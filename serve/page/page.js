// The page: draws one prompt and seed at 1, 2, 4 and 8 steps, one after the other so that the times are comparable.
import { asCurl, asPython, bodyOf } from "./code.js";
import { readEvents } from "./events.js";
import { forget, recall, remember } from "./history.js";

const $ = (id) => document.getElementById(id);
// the application may live under a prefix: where this file is, is where it is
const ROOT = new URL("..", import.meta.url).href.replace(/\/$/, "");
const STEPS = [1, 2, 4, 8];
const state = { models: [], steps: STEPS, cards: new Map(), running: null, last: null, drawing: null, turn: 0, touched: new Set() };

const stored = {
  get: (name) => { try { return localStorage.getItem(name); } catch { return null; } },
  set: (name, value) => { try { localStorage.setItem(name, value); } catch { /* a private window keeps nothing */ } },
};

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function complain(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// ---------------------------------------------------------------------------------------------- start
async function loadModels() {
  const answer = await fetch(`${ROOT}/v1/models`, { headers: headers() });
  if (!answer.ok) {
    if (answer.status === 401) { $("more").open = true; }
    state.locked = answer.status === 401; // no use in trying again before there is a key
    throw new Error(await reason(answer));
  }
  state.models = (await answer.json()).data;
  const base = state.models[0];
  $("model-name").textContent = base.id;
  document.title = `${base.id}: few-step images`;
  const named = state.models.filter((model) => model.lora && model.lora !== "none");
  const options = [["", named.length ? "by step count" : "none (the bare base)"]];
  for (const model of named) options.push([model.lora, model.lora]);
  if (named.length) options.push(["none", "none (the bare base)"]);
  $("lora").replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  $("size").replaceChildren(...base.sizes.map((size) => new Option(size, size)));
  $("size-field").hidden = base.sizes.length < 2;
  $("examples").replaceChildren(...base.examples.map(exampleButton));
  if (!$("prompt").value && base.examples.length) $("prompt").value = base.examples[0];
  $("scale").max = base.max_lora_scale;
  $("guidance").max = base.max_guidance;
  showDefaults();
  showSteps();
  showGuidance();
  showCode();
}

function exampleButton(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => { $("prompt").value = text; showCode(); redraw(); });
  return button;
}

// Where the sliders stand until they are moved.
function showDefaults() {
  const model = chosenModel();
  for (const name of ["eta", "guidance"]) if (model && !state.touched.has(name)) $(name).value = model[`default_${name}`];
  outputs();
}

// A LoRA that was made for one step count is drawn in that alone.
function showSteps() {
  const only = chosenModel()?.only_steps, most = state.models[0]?.max_steps ?? Infinity;
  const steps = only ? [only] : STEPS.filter((n) => n <= most);
  if (state.cards.size && steps.join() === state.steps.join()) return;
  state.running?.abort();
  state.steps = steps;
  $("code-steps").replaceChildren(...steps.map((n) => new Option(n, n)));
  $("code-steps").value = String(steps.includes(4) ? 4 : steps.at(-1));
  makeCards();
}

function makeCards() {
  state.cards.clear();
  for (const steps of state.steps) {
    const card = $("card").content.firstElementChild.cloneNode(true);
    card.querySelector("h3").textContent = steps === 1 ? "1 step" : `${steps} steps`;
    card.dataset.steps = steps;
    state.cards.set(steps, card);
  }
  $("results").replaceChildren(...state.cards.values());
}

/** Whether the models are known now; if not, the page says why. */
async function tryModels() {
  try {
    await loadModels();
    complain("");
  } catch (error) {
    complain(error.message);
  }
  return state.models.length > 0;
}

async function watchHealth() {
  let text = "cannot be reached", kind = "wrong";
  try {
    const health = await (await fetch(`${ROOT}/health`)).json();
    [text, kind] = health.status === "ok" ? ["ready", "ok"] : ["starting", ""];
  } catch { /* said already */ }
  $("health").textContent = text;
  $("health").className = `health ${kind}`;
  if (kind === "ok" && !state.models.length && !state.locked) tryModels();
  setTimeout(watchHealth, kind === "ok" ? 15000 : 2000);
}

// ---------------------------------------------------------------------------------------------- settings
function settings() {
  const lora = $("lora").value, scale = Number($("scale").value), guidance = Number($("guidance").value);
  return {
    prompt: $("prompt").value.trim(),
    seed: Number($("seed").value),
    lora: lora || null,
    scale: lora && lora !== "none" ? scale : 1,
    eta: noisy() ? Number($("eta").value) : null,
    size: $("size").value,
    guidance: guided() ? guidance : null,
    negative: guided() && guidance > 1 ? $("negative").value.trim() : "",
  };
}

function chosenModel() {
  const chosen = $("lora").value;
  return state.models.find((one) => (chosen ? one.lora === chosen : one.lora === null));
}

/** Whether eta can be set: LCM puts all noise back. */
function noisy() {
  return chosenModel()?.scheduler !== "LCMScheduler";
}

function guided() {
  return Boolean(chosenModel()?.keeps_guidance);
}

function showGuidance() {
  for (const element of document.querySelectorAll(".guided")) element.hidden = !guided();
  $("eta").closest("label").hidden = !noisy();
  // without a LoRA that is named there is none to scale
  $("scale").closest("label").hidden = !$("lora").value || $("lora").value === "none";
}

function newSeed() {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
}

function showCode() {
  const language = document.querySelector("input[name=language]:checked").value;
  const make = language === "curl" ? asCurl : asPython;
  const sizes = state.models[0]?.sizes ?? [];
  $("code").textContent = make(bodyOf(settings(), Number($("code-steps").value), sizes), ROOT, Boolean($("key").value));
}

// ---------------------------------------------------------------------------------------------- drawing
function draw() {
  if (state.running) { state.running.abort(); return; }
  state.drawing = drawAll();
}

/** Draw what is set now, whatever is being drawn. */
async function redraw() {
  const turn = ++state.turn;
  state.running?.abort();
  await state.drawing;
  if (turn === state.turn && !state.running) draw();
}

async function drawAll() {
  if (!$("form").reportValidity()) return;
  if (!state.models.length && (!await tryModels() || state.running)) return; // pressed twice meanwhile
  if (!$("keep-seed").checked && state.last !== null && Number($("seed").value) === state.last) newSeed();
  const asked = settings();
  state.last = asked.seed;
  showCode();
  complain("");
  const control = state.running = new AbortController();
  $("draw").textContent = "Stop";
  for (const card of state.cards.values()) reset(card);
  let final = null;
  try {
    for (const [steps, card] of state.cards) final = await drawOne(asked, steps, card, control.signal);
    $("live").textContent = `Done: ${state.steps.join(", ")} steps of seed ${asked.seed}`;
    await remember(asked, final, stored);
    showHistory();
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
    for (const card of state.cards.values()) settle(card);
  } finally {
    state.running = null;
    $("draw").textContent = "Draw";
  }
}

async function drawOne(asked, steps, card, signal) {
  const begun = performance.now();
  const body = { ...bodyOf(asked, steps, state.models[0].sizes), stream: true, partial_images: steps - 1 };
  card.querySelector("progress").hidden = false;
  card.querySelector(".empty").textContent = "";
  const answer = await fetch(`${ROOT}/v1/images/generations`, {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  });
  if (!answer.ok) throw new Error(await reason(answer));
  for await (const event of readEvents(answer.body)) {
    if (event.error) throw new Error(event.error.message);
    if (event.type === "image_generation.partial_image") {
      card.querySelector("progress").value = event.step / steps;
      show(card, event, asked, true);
    } else {
      show(card, event, asked, false);
      done(card, event, asked, performance.now() - begun);
      return event;
    }
  }
  throw new Error("the server closed the stream before the image was done");
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

function reset(card) {
  const image = card.querySelector("img");
  image.hidden = true;
  image.removeAttribute("src");
  card.querySelector("progress").value = 0;
  card.querySelector(".empty").textContent = "waiting";
  card.querySelector(".times").replaceChildren();
  card.querySelector(".with").textContent = "";
  card.querySelector(".download").hidden = true;
}

function settle(card) {
  card.querySelector("progress").hidden = true;
  if (card.querySelector("img").hidden) card.querySelector(".empty").textContent = "not drawn";
}

function show(card, event, asked, preview) {
  const image = card.querySelector("img");
  image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
  image.alt = preview ? `Preview after step ${event.step}` : `${asked.prompt}, ${event.num_inference_steps} steps, seed ${event.seed}`;
  image.classList.toggle("preview", preview);
  image.classList.toggle("small", Number(event.size.split("x")[0]) <= 128);
  image.hidden = false;
}

function done(card, event, asked, roundTrip) {
  card.querySelector("progress").hidden = true;
  const { text = 0, denoise = 0, decode = 0 } = event.timings;
  const strong = document.createElement("b");
  strong.textContent = time(1000 * (text + denoise + decode));
  card.querySelector(".times").replaceChildren(strong, " model", document.createElement("br"), `${time(roundTrip)} in all`);
  card.querySelector(".with").textContent = event.lora.name === "none" ? "" : event.lora.name;
  const link = card.querySelector(".download");
  link.href = card.querySelector("img").src;
  link.download = `${asked.prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 40)}-${event.seed}-${event.num_inference_steps}.${event.output_format}`;
  link.setAttribute("aria-label", `Download the image of ${event.num_inference_steps} steps`);
  link.hidden = false;
}

const time = (ms) => (ms < 995 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

// ---------------------------------------------------------------------------------------------- history
function showHistory() {
  const entries = recall(stored);
  $("history-section").hidden = !entries.length;
  $("history").replaceChildren(...entries.map((entry) => {
    const item = document.createElement("li"), button = document.createElement("button");
    const image = new Image(56, 56);
    image.src = entry.thumbnail;
    image.alt = "";
    const text = document.createElement("span"), what = document.createElement("span"), which = document.createElement("span");
    what.className = "what"; what.textContent = entry.prompt;
    which.className = "which"; which.textContent = `seed ${entry.seed}${entry.lora ? `, ${entry.lora}` : ""}`;
    text.append(what, which);
    button.type = "button";
    button.append(image, text);
    button.addEventListener("click", async () => { if (await restore(entry)) redraw(); });
    item.append(button);
    return item;
  }));
}

/** Set everything as it was; false, and why, where that cannot be. */
async function restore(entry) {
  if (!state.models.length && !await tryModels()) return false;
  const gone = (what, value) => { complain(`This was drawn with ${what} ${value}, which this server no longer has.`); return false; };
  if (entry.lora && ![...$("lora").options].some((option) => option.value === entry.lora)) return gone("the LoRA", entry.lora);
  if (entry.size && !state.models[0].sizes.includes(entry.size)) return gone("the size", entry.size);
  $("prompt").value = entry.prompt;
  $("seed").value = entry.seed;
  $("lora").value = entry.lora ?? "";
  $("scale").value = entry.scale;
  $("eta").value = entry.eta ?? chosenModel().default_eta;
  $("guidance").value = entry.guidance ?? 1;
  for (const name of ["eta", "guidance"]) state.touched.add(name);
  $("negative").value = entry.negative;
  if (entry.size) $("size").value = entry.size;
  state.last = null; // the same seed again is what is asked for
  showSteps();
  showGuidance();
  outputs();
  scrollTo({ top: 0 });
  return true;
}

function outputs() {
  for (const name of ["scale", "eta", "guidance"]) $(`${name}-out`).value = Number($(name).value);
}

// ---------------------------------------------------------------------------------------------- colours, copying
const THEMES = { "": "Colours: auto", light: "Colours: light", dark: "Colours: dark" };

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme;
  $("theme").title = THEMES[theme];
  $("theme").setAttribute("aria-label", THEMES[theme]);
  stored.set("hypersd.theme", theme);
}

async function copy() {
  const text = $("code").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page that is not on localhost or https has no clipboard
    getSelection().selectAllChildren($("code"));
    document.execCommand("copy");
  }
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
}

// ---------------------------------------------------------------------------------------------- wiring
$("form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
for (const name of ["eta", "guidance"]) $(name).addEventListener("input", () => state.touched.add(name));
$("lora").addEventListener("input", showDefaults);
$("form").addEventListener("input", () => { outputs(); showSteps(); showGuidance(); showCode(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); draw(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.running) state.running.abort();
  if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("prompt").focus();
  }
});
$("dice").addEventListener("click", () => { newSeed(); showCode(); });
$("key").addEventListener("change", tryModels);
$("code-section").addEventListener("change", showCode);
$("copy").addEventListener("click", copy);
$("clear").addEventListener("click", () => { forget(stored); showHistory(); });
$("theme").addEventListener("click", () => {
  const order = Object.keys(THEMES), now = document.documentElement.dataset.theme ?? "";
  setTheme(order[(order.indexOf(now) + 1) % order.length]);
});

setTheme(stored.get("hypersd.theme") in THEMES ? stored.get("hypersd.theme") : "");
newSeed();
outputs();
showSteps();
showHistory();
watchHealth();
tryModels();
