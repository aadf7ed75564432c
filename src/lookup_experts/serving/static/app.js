// The page: sends prompts, and shows every second what the server does.

import { ApiError, fetchStats, streamChunks } from "./api.js";
import { keep, kept } from "./conversation.js";
import { formatBytes, hasLookupExperts, prepare, reads } from "./details.js";
import { clear, Turn } from "./transcript.js";

const element = (id) => document.getElementById(id);
const POLL_MILLISECONDS = 1000;

let served = null; // the first that the server told of itself, as the model with the chosen table
let stated = null; // the same, of the model without one
let turns = [];
let running = null; // the AbortController of what is generated now

// ------------------------------------------------------------------ what the server does

function showStats(stats) {
  element("live-speed").textContent = stats.tokens_per_second.toFixed(1);
  element("live-hits").textContent = reads(stats) ? `${(100 * stats.hit_rate).toFixed(1)} %` : "–";
  element("live-memory").textContent = formatBytes(stats.resident_bytes);
  element("live-queue").textContent = `${stats.running}, ${stats.waiting}`;
  if (served === null) begin(stats);
}

function begin(stats) {
  stated = stats;
  const before = kept();
  offerTables(Object.keys(stats.tables), before?.table);
  element("mode-row").hidden = !stats.chat;
  const chosen = before?.model === stats.model ? before.mode : "chat";
  element("mode").value = stats.chat ? chosen : "completion";
  useTable();
  if (before !== null && before.model !== stats.model) forgetAll();
}

function offerTables(names, chosen) {
  const option = (value, text) => new Option(text, value, false, value === chosen);
  element("table").replaceChildren(option("", "none"), ...names.map((name) => option(name, name)));
  element("table-row").hidden = names.length === 0;
}

function useTable() {
  const table = element("table").value;
  served = { ...stated, ...stated.tables[table], name: table ? `${stated.model}:${table}` : stated.model };
  element("model").textContent = describe(served);
  prepare(served);
  showMode();
}

function describe(stats) {
  const form = hasLookupExperts(stats)
    ? null
    : { dense: "dense", moe: `mixture of ${stats.experts} experts` }[stats.kind];
  return `${stats.name} · ${stats.layers} layers · ${form ?? describeRows(stats)}`;
}

function describeRows(stats) {
  const rows = stats.router ? `${stats.experts} lookup experts` : `one row of ${stats.row_size} per layer`;
  return `${rows}, ${stats.record_bytes === null ? "training form" : `table: ${stats.store}`}`;
}

const isChat = () => element("mode").value === "chat";

function showMode() {
  element("system-row").hidden = !isChat();
  element("send").textContent = isChat() ? "Send" : "Generate";
  element("prompt").placeholder = isChat() ? "Ask something" : "Once upon a time";
  const first = isChat() ? "Say something to the model." : "Give the beginning of a text.";
  const opened =
    " Every token that it adds can be opened, with a click or with the arrow keys and Enter, to see" +
    " what its experts did.";
  element("hint").textContent = served && hasLookupExperts(served) ? first + opened : first;
}

async function poll() {
  if (!document.hidden) {
    try {
      showStats(await fetchStats(element("key").value));
    } catch (error) {
      for (const figure of document.querySelectorAll(".live dd")) figure.textContent = "–";
      if (error.status === 401) askForKey();
      else if (served === null) element("model").textContent = sentence(error);
    }
  }
  setTimeout(poll, POLL_MILLISECONDS);
}

function askForKey() {
  element("key-row").hidden = false;
  if (served === null) element("model").textContent = "This server asks for an API key.";
}

// ------------------------------------------------------------------ generating

function sentence(error) {
  if (error instanceof ApiError) return error.message;
  return "The server can’t be reached.";
}

function settings() {
  const seed = element("seed").value;
  return {
    model: served.name,
    max_tokens: element("max-tokens").valueAsNumber,
    temperature: element("temperature").valueAsNumber,
    top_p: element("top-p").valueAsNumber,
    seed: seed === "" ? null : Number(seed),
    ...(hasLookupExperts(served) && { lookup_details: true }),
  };
}

/** What is asked for a turn that is new, or that goes on: [route, body]. */
function request(turn) {
  if (!turn.isChat) return ["completions", { ...settings(), prompt: turn.prompt + turn.text }];
  const messages = [];
  const system = element("system").value.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const said of turns.slice(0, turns.indexOf(turn) + 1)) {
    const isAnswered = said.text.trim() !== "";
    if (!said.isChat || (said !== turn && !isAnswered)) continue; // templates want turns by turns
    messages.push({ role: "user", content: said.prompt });
    if (isAnswered) messages.push({ role: "assistant", content: said.text });
  }
  const goesOn = messages.at(-1).role === "assistant";
  return ["chat/completions", { ...settings(), messages, ...(goesOn && { continue_final_message: true }) }];
}

function setRunning(controller) {
  running = controller;
  element("send").disabled = controller !== null;
  element("stop").disabled = controller === null;
}

function showError(error) {
  element("error").textContent = sentence(error);
  if (error.status === 401) {
    askForKey();
    element("key").focus();
  }
}

/** Stream an answer, or more of it, into a turn; an interrupted one keeps what had come. */
async function generate(turn) {
  const controller = new AbortController();
  setRunning(controller);
  element("error").textContent = "";
  element("status").textContent = "Generating …";
  turn.showEnd(null);
  const startedAt = performance.now();
  const [route, body] = request(turn);
  let end = "broken";
  let count = 0;
  try {
    for await (const chunk of streamChunks(route, body, element("key").value, controller.signal)) {
      if (chunk.usage) count = chunk.usage.completion_tokens;
      const choice = chunk.choices[0];
      if (!choice || choice.delta?.role) continue;
      const text = choice.text ?? choice.delta.content ?? "";
      if (choice.finish_reason) end = choice.finish_reason;
      else count += 1;
      if (chunk.lookup) turn.add(text, chunk.lookup);
      else turn.addText(text);
    }
  } catch (error) {
    if (controller.signal.aborted) end = "stopped";
    else showError(error);
  }
  const seconds = (performance.now() - startedAt) / 1000;
  const how = end === "stopped" || end === "broken" ? "Stopped" : "Done";
  element("status").textContent = turn.isShown ? `${how}: ${count} tokens in ${seconds.toFixed(1)} s` : "";
  turn.limit = body.max_tokens;
  turn.finish(end);
  setRunning(null);
}

/** Under a text that has not come to its own end, why, and a way to go on. */
function offerToGoOn(turn) {
  const why = {
    length: `Cut off at the limit of ${turn.limit} tokens.`,
    stopped: "Stopped.",
    broken: "Broken off.",
  }[turn.end];
  turn.showEnd(why, () => goOn(turn));
}

async function goOn(turn) {
  if (running) return;
  await generate(turn);
  settle(turn);
}

function settle(turn) {
  if (turn.isShown) offerToGoOn(turn);
  keepAll();
}

async function send(event) {
  event.preventDefault();
  if (running) return;
  const prompt = element("prompt").value;
  if (served === null) {
    try {
      showStats(await fetchStats(element("key").value));
    } catch (error) {
      showError(error);
      return;
    }
  }
  const turn = new Turn({ prompt, isChat: isChat(), speaker: served.name });
  for (const before of turns) before.dropGoOn();
  turns.push(turn);
  if (turn.isChat) element("prompt").value = "";
  await generate(turn);
  if (!turn.isShown) return; // cleared away, and the others with it
  if (turn.text === "" && turn.tokens.length === 0 && turn.end === "broken") {
    turns.pop();
    turn.remove();
    element("status").textContent = "";
    if (turns.length > 0) offerToGoOn(turns.at(-1));
    element("prompt").value ||= prompt; // to be sent again
  } else {
    settle(turn);
  }
}

// ------------------------------------------------------------------ over a reload

function keepAll() {
  const model = served?.model ?? kept()?.model;
  const [mode, system, table] = ["mode", "system", "table"].map((id) => element(id).value);
  keep({ model, mode, system, table, turns });
}

function restore() {
  const before = kept();
  if (before === null) return;
  element("mode").value = before.mode;
  element("system").value = before.system;
  element("system-row").open = before.system !== "";
  turns = before.turns.map((turn) => new Turn(turn));
  if (turns.length > 0) offerToGoOn(turns.at(-1));
}

function forgetAll() {
  running?.abort();
  turns = [];
  clear();
  element("status").textContent = element("error").textContent = "";
  keepAll();
}

element("composer").addEventListener("submit", send);
element("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) element("composer").requestSubmit();
});
element("mode").addEventListener("change", () => {
  showMode();
  keepAll();
});
element("table").addEventListener("change", () => {
  useTable();
  keepAll();
});
element("stop").addEventListener("click", () => running?.abort());
element("clear").addEventListener("click", forgetAll);
// Before the browser breaks off what is loading: that would look like a lost connection.
window.addEventListener("beforeunload", () => running?.abort());
window.addEventListener("pagehide", () => {
  if (running) turns.at(-1).end = "stopped";
  if (served) keepAll();
});
restore();
showMode();
poll();
