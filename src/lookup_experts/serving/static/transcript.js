// The text, token by token: focus moves between tokens, one of them can be pinned.

import { forget, show } from "./details.js";

const box = document.getElementById("transcript");
const NEAR_END = 40; // pixels from the end within which the text is followed

/** Where a token's details are kept. */
const known = new WeakMap();
let pinned = null;
let entry = null; // the token that Tab leads to

/** One prompt and what the model made of it. */
export class Turn {
  constructor(prompt, isChat) {
    document.getElementById("hint").hidden = true;
    this.element = document.createElement("div");
    this.element.className = isChat ? "turn chat" : "turn";
    const shown = document.createElement("span");
    shown.className = "prompt";
    shown.textContent = prompt;
    this.element.append(shown);
    box.append(this.element);
    box.scrollTop = box.scrollHeight;
    this.text = "";
    this.previous = null;
    this.count = 0;
  }

  /** A token with its piece of text; the piece of half a character is empty. */
  add(text, lookup) {
    if (!this.isShown) return; // cleared away while it came
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END;
    const token = document.createElement("span");
    token.className = "token";
    token.textContent = text;
    token.tabIndex = -1;
    token.setAttribute("role", "button");
    token.setAttribute("aria-pressed", "false");
    if (text === "") token.classList.add("partial");
    if (lookup.cache_hit !== null) token.classList.add(lookup.cache_hit ? "hit" : "miss");
    known.set(token, { lookup, input: this.previous });
    this.element.append(token);
    this.previous = lookup.text;
    this.text += text;
    this.count += 1;
    if (this.count === 1 && pinned === null) leadTo(token);
    if (pinned === null) show(lookup, known.get(token).input, false);
    if (follows) box.scrollTop = box.scrollHeight;
  }

  /** Text that belongs to no token of its own. */
  finish(text) {
    this.text += text;
    this.element.append(text);
  }

  /** Whether it is on the page: not cleared away, nor removed. */
  get isShown() {
    return this.element.isConnected;
  }

  /** Take back a turn that nothing came of. */
  remove() {
    this.element.remove();
    document.getElementById("hint").hidden = box.querySelector(".turn") !== null;
  }
}

/** Back to an empty page. */
export function clear() {
  for (const turn of box.querySelectorAll(".turn")) turn.remove();
  document.getElementById("hint").hidden = false;
  pinned = entry = null;
  forget();
}

function leadTo(token) {
  if (entry) entry.tabIndex = -1;
  entry = token;
  entry.tabIndex = 0;
}

function present(token) {
  const { lookup, input } = known.get(token);
  show(lookup, input, token === pinned);
}

function pin(token) {
  if (pinned) pinned.setAttribute("aria-pressed", "false");
  pinned = token === pinned ? null : token;
  if (pinned) pinned.setAttribute("aria-pressed", "true");
  leadTo(token);
  present(token);
  if (pinned) document.getElementById("details").scrollIntoView({ block: "nearest" });
}

function move(token, key) {
  const tokens = [...box.querySelectorAll(".turn .token")];
  const place = tokens.indexOf(token);
  const next = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: tokens.length - 1 }[key];
  return tokens[next];
}

const tokenOf = (event) => event.target.closest(".turn .token");

box.addEventListener("click", (event) => {
  const token = tokenOf(event);
  if (token) pin(token);
});

box.addEventListener("focusin", (event) => {
  const token = tokenOf(event);
  if (!token) return;
  leadTo(token);
  if (pinned === null) present(token);
});

box.addEventListener("mouseover", (event) => {
  const token = tokenOf(event);
  if (token && pinned === null) present(token);
});

box.addEventListener("keydown", (event) => {
  const token = tokenOf(event);
  if (!token) return;
  if (event.key === "Enter" || event.key === " ") {
    pin(token);
  } else if (event.key === "Escape") {
    if (pinned) pin(pinned);
  } else {
    const next = move(token, event.key);
    if (!next) return;
    next.focus();
  }
  event.preventDefault();
});
