// The page: sends prompts, and shows every second what the server does.

import { ApiError, fetchStats, streamChunks } from "./api.js";
import { formatBytes, prepare } from "./details.js";
import { clear, Turn } from "./transcript.js";

const element = (id) => document.getElementById(id);
const POLL_MILLISECONDS = 1000;

let messages = [];
let running = null; // the AbortController of what is generated now
let isPrepared = false;

// ------------------------------------------------------------------ what the server does

function showStats(stats) {
  const reads = stats.kind === "mole-table" && stats.store !== "memory";
  element("live-speed").textContent = stats.tokens_per_second.toFixed(1);
  element("live-hits").textContent = reads ? `${(100 * stats.hit_rate).toFixed(1)} %` : "–";
  element("live-memory").textContent = formatBytes(stats.resident_bytes);
  element("live-queue").textContent = `${stats.running}, ${stats.waiting}`;
  if (!isPrepared) {
    isPrepared = true;
    element("model").textContent = describe(stats);
    prepare(stats);
  }
}

function describe(stats) {
  const form = {
    dense: "dense",
    moe: `mixture of ${stats.experts} experts`,
    "mole-experts": `${stats.experts} lookup experts, training form`,
    "mole-table": `${stats.experts} lookup experts, table: ${stats.store}`,
  }[stats.kind];
  return `${stats.model} · ${stats.layers} layers · ${form}`;
}

async function poll() {
  if (!document.hidden) {
    try {
      showStats(await fetchStats(element("key").value));
    } catch (error) {
      for (const figure of document.querySelectorAll(".live dd")) figure.textContent = "–";
      if (error.status === 401) askForKey();
      else if (!isPrepared) element("model").textContent = sentence(error);
    }
  }
  setTimeout(poll, POLL_MILLISECONDS);
}

function askForKey() {
  element("key-row").hidden = false;
  if (!isPrepared) element("model").textContent = "This server asks for an API key.";
}

// ------------------------------------------------------------------ generating

function sentence(error) {
  if (error instanceof ApiError) return error.message;
  return "The server can’t be reached.";
}

function settings() {
  const seed = element("seed").value;
  return {
    max_tokens: element("max-tokens").valueAsNumber,
    temperature: element("temperature").valueAsNumber,
    top_p: element("top-p").valueAsNumber,
    seed: seed === "" ? null : Number(seed),
  };
}

function setRunning(controller) {
  running = controller;
  element("send").disabled = controller !== null;
  element("stop").disabled = controller === null;
}

/** Stream one answer into a turn; an interrupted one keeps what had come. Gives whether any had. */
async function generate(turn, route, body) {
  const controller = new AbortController();
  setRunning(controller);
  element("error").textContent = "";
  element("status").textContent = "Generating …";
  const startedAt = performance.now();
  let end = "Done";
  try {
    for await (const chunk of streamChunks(route, body, element("key").value, controller.signal)) {
      const choice = chunk.choices[0];
      const text = choice.text ?? choice.delta.content ?? "";
      if (chunk.lookup) turn.add(text, chunk.lookup);
      else turn.finish(text);
    }
  } catch (error) {
    end = "Stopped";
    if (!controller.signal.aborted) {
      element("error").textContent = sentence(error);
      if (error.status === 401) {
        askForKey();
        element("key").focus();
      }
    }
  }
  const seconds = (performance.now() - startedAt) / 1000;
  const counted = `${end}: ${turn.count} tokens in ${seconds.toFixed(1)} s`;
  element("status").textContent = turn.isShown ? counted : "";
  setRunning(null);
  return turn.count > 0;
}

async function send(event) {
  event.preventDefault();
  if (running) return;
  const prompt = element("prompt").value;
  const isChat = element("mode").value === "chat";
  const turn = new Turn(prompt, isChat);
  const asked = [...messages, { role: "user", content: prompt }];
  if (isChat) element("prompt").value = "";
  const hasCome = isChat
    ? await generate(turn, "chat/completions", { ...settings(), messages: asked })
    : await generate(turn, "completions", { ...settings(), prompt });
  if (!turn.isShown) return; // cleared away, and a conversation with it
  if (!hasCome) {
    turn.remove();
    element("prompt").value ||= prompt; // to be sent again
  } else if (isChat) {
    messages = [...asked, { role: "assistant", content: turn.text }];
  }
}

element("composer").addEventListener("submit", send);
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("composer").requestSubmit();
});
element("stop").addEventListener("click", () => running?.abort());
element("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  clear();
  element("status").textContent = element("error").textContent = "";
});
poll();
