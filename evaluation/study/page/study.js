"use strict";

const $ = (id) => document.getElementById(id);
const keys = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", " ": "tie" };
let pair = null, lost = false, since = 0, busy = false;

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const answer = await fetch(path, options);
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(typeof content.detail === "string" ? content.detail : `the server answered ${answer.status}`);
  return content;
}

function load(image, source) {
  return new Promise((resolve, reject) => {
    image.onload = () => { image.classList.toggle("small", image.naturalWidth < 200); resolve(); };
    image.onerror = () => reject(new Error("a picture could not be loaded"));
    image.src = source;
  });
}

async function show(state) {
  $("question").textContent = document.title = state.question;
  const next = state.pair;
  pair = null;  // no vote on what is not there to be seen
  $("thanks").hidden = next !== null;
  $("back").hidden = !(next ? next.can_go_back : state.answered > 0);
  $("pair").hidden = next === null;
  $("prompt").textContent = next ? next.prompt : "";
  const progress = document.querySelector(".progress");
  const of = next ? next.of : Math.max(1, state.answered);
  progress.setAttribute("aria-valuemax", of);
  progress.setAttribute("aria-valuenow", state.answered);
  $("bar").style.width = `${100 * Math.min(1, state.answered / of)}%`;
  $("count").textContent = next ? `${next.number} of ${next.of}` : "";
  if (!next) return;
  await Promise.all([load($("left"), next.left), load($("right"), next.right)]);
  pair = next;
  since = performance.now();  // the time to think begins when both are there to be seen
}

async function run(work) {
  if (busy) return;
  busy = true;
  $("wrong").hidden = true;
  for (const button of document.querySelectorAll("button")) button.disabled = true;
  try {
    lost = false;
    await show(await work());
  } catch (error) {
    lost = pair === null;
    $("wrong").textContent = `${error.message}. Your earlier answers are kept; try again.`;
    $("wrong").hidden = false;
  } finally {
    busy = false;
    for (const button of document.querySelectorAll("button")) button.disabled = false;
  }
}

function vote(choice) {
  if (!pair) { if (lost) run(() => ask("/api/next")); return; }
  const seconds = Math.min(86400, (performance.now() - since) / 1000);
  run(() => ask("/api/vote", { ticket: pair.ticket, choice, seconds }));
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.choice) vote(button.dataset.choice);
  if (button?.id === "back") run(() => ask("/api/back", {}));
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const onButton = event.target instanceof HTMLButtonElement;
  if (event.key in keys && !(event.key === " " && onButton)) { event.preventDefault(); vote(keys[event.key]); }
  if (event.key === "Backspace" && !$("back").hidden) { event.preventDefault(); run(() => ask("/api/back", {})); }
});
run(() => ask("/api/next"));
