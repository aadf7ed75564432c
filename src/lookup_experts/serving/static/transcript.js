// The text, token by token: focus moves between tokens, one of them can be pinned.

import { forget, show } from "./details.js";
import { blocksOf } from "./markdown.js";

const box = document.getElementById("transcript");
const NEAR_END = 40; // pixels from the end within which the text is followed

/** Which token of which turn an element shows. */
const shownBy = new WeakMap();
let pinned = null; // {turn, index}
let entry = null; // the element that Tab leads to

function made(name, className, text) {
  const element = document.createElement(name);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const isSame = (one, other) => one?.turn === other?.turn && one?.index === other?.index;

/** One prompt and what the model made of it. */
export class Turn {
  /**
   * @param {object} said `prompt`, `isChat`, `speaker` (the model's name), and what `toJSON` gave of
   * a turn that was kept
   */
  constructor({ prompt, isChat, speaker, text = "", tokens = [], end = null, limit = null }) {
    Object.assign(this, { prompt, isChat, speaker, text: "", tokens: [], end: null, limit });
    this.owners = []; // of each character of the text its token
    this.blocks = []; // what is drawn of a chat: {source, element}
    this.frame = 0;
    document.getElementById("hint").hidden = true;
    this.element = made("article", isChat ? "turn chat" : "turn");
    this.answer = made(isChat ? "div" : "span", isChat ? "answer markdown" : "answer");
    const shown = made(isChat ? "div" : "span", "prompt", prompt);
    if (isChat) {
      this.element.append(made("h3", "speaker", "You"), shown);
      this.element.append(made("h3", "speaker model", speaker), this.answer);
    } else {
      this.element.append(shown, this.answer);
    }
    box.append(this.element);
    for (const { begin, end: stop, lookup } of tokens) {
      this.addText(text.slice(this.text.length, begin));
      this.take(text.slice(begin, stop), lookup);
    }
    this.addText(text.slice(this.text.length));
    this.finish(end);
    box.scrollTop = box.scrollHeight;
  }

  /** As plain values, for the constructor. */
  toJSON() {
    const { prompt, isChat, speaker, text, tokens, end, limit } = this;
    return { prompt, isChat, speaker, text, tokens, end, limit };
  }

  /** A token with its piece of text, which is empty for a part of a character. */
  add(text, lookup) {
    if (!this.isShown) return; // cleared away while it came
    this.take(text, lookup);
    if (pinned === null) present({ turn: this, index: this.tokens.length - 1 }, false);
  }

  take(text, lookup) {
    const begin = this.text.length;
    const index = this.tokens.length;
    this.tokens.push({ begin, end: begin + text.length, lookup });
    for (let place = 0; place < text.length; place += 1) this.owners.push(index);
    this.write(text, () => this.piece(index, text));
  }

  /** Text that belongs to no token that is known. */
  addText(text) {
    if (!this.isShown || text === "") return;
    for (let place = 0; place < text.length; place += 1) this.owners.push(-1);
    this.write(text, () => text);
  }

  write(text, node) {
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END;
    this.text += text;
    if (this.isChat) this.drawSoon();
    else this.answer.append(node());
    ensureEntry();
    if (follows) box.scrollTop = box.scrollHeight;
  }

  /**
   * The end of an answer, or of what has come of it.
   * @param {string|null} end `stop`, `length`, `stopped` (by the reader), `broken`; null: none yet
   */
  finish(end) {
    this.end = end;
    const last = this.tokens.length - 1;
    if (end === "stop" && last >= 0 && this.tokens[last].begin === this.tokens[last].end) {
      for (const element of this.elementsOf(last)) element.classList.replace("partial", "ending");
    }
    if (this.isChat) this.draw();
  }

  /** An element for a token, or for a part of one. */
  piece(index, text) {
    const { lookup } = this.tokens[index];
    const token = made("span", "token", text);
    const isPinned = isSame(pinned, { turn: this, index });
    token.tabIndex = -1;
    token.setAttribute("role", "button");
    token.setAttribute("aria-pressed", String(isPinned));
    token.dataset.token = index;
    if (text === "") token.classList.add("partial");
    if (lookup.cache_hit !== null) token.classList.add(lookup.cache_hit ? "hit" : "miss");
    shownBy.set(token, { turn: this, index });
    return token;
  }

  elementsOf(index) {
    return this.answer.querySelectorAll(`[data-token="${index}"]`);
  }

  // ---------------------------------------------------------------- Markdown

  /** Draw with the next frame, however many tokens come until then. */
  drawSoon() {
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  /** Draw the blocks that have changed, which are the last ones. */
  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END;
    const focused = shownBy.get(document.activeElement);
    const blocks = blocksOf(this.text);
    let same = 0;
    while (same < this.blocks.length && this.blocks[same].source === blocks[same]?.source) same += 1;
    for (const { element } of this.blocks.splice(same)) element.remove();
    const drawn = new Set(); // tokens whose first piece is there
    for (const { source, draw } of blocks.slice(same)) {
      const element = draw((text, places) => this.nodes(text, places, drawn));
      this.answer.append(element);
      this.blocks.push({ source, element });
    }
    ensureEntry();
    if (focused?.turn === this) this.elementsOf(focused.index)[0]?.focus();
    if (follows) box.scrollTop = box.scrollHeight;
  }

  /** The nodes of a run of text: an element for each token, or text where none is known. */
  nodes(text, places, drawn) {
    const found = [];
    let begin = 0;
    for (let at = 1; at <= text.length; at += 1) {
      const owner = this.owners[places[begin]] ?? -1;
      if (at < text.length && (this.owners[places[at]] ?? -1) === owner) continue;
      const part = text.slice(begin, at);
      const piece = owner < 0 ? part : this.piece(owner, part);
      if (owner >= 0 && drawn.has(owner)) piece.classList.add("more");
      drawn.add(owner);
      found.push(piece);
      begin = at;
    }
    return found;
  }

  // ---------------------------------------------------------------- its place

  /** Whether it is on the page: not cleared away, nor removed. */
  get isShown() {
    return this.element.isConnected;
  }

  /** Take back a turn that nothing came of. */
  remove() {
    this.element.remove();
    document.getElementById("hint").hidden = box.querySelector(".turn") !== null;
  }

  /** Offer no longer to go on, since another turn follows. */
  dropGoOn() {
    this.element.querySelector(".go-on")?.remove();
  }

  /** Say under the text how it ended; `goOn`, if given, is offered as a button. */
  showEnd(sentence, goOn) {
    this.element.querySelector(".end")?.remove();
    if (!sentence) return;
    const line = made("p", "end", `${sentence} `);
    if (goOn) {
      const button = made("button", "go-on", "Go on");
      button.type = "button";
      button.addEventListener("click", goOn);
      line.append(button);
    }
    this.element.append(line);
    box.scrollTop = box.scrollHeight;
  }
}

/** Back to an empty page. */
export function clear() {
  for (const turn of box.querySelectorAll(".turn")) turn.remove();
  document.getElementById("hint").hidden = false;
  pinned = entry = null;
  forget();
}

/** Tab leads to a token wherever there is one. */
function ensureEntry() {
  if (entry?.isConnected) return;
  entry = null;
  const first = box.querySelector(".turn .token");
  if (first) leadTo(first);
}

function leadTo(token) {
  if (entry) entry.tabIndex = -1;
  entry = token;
  entry.tabIndex = 0;
}

function present(place, isPinned) {
  const { lookup } = place.turn.tokens[place.index];
  const before = place.turn.tokens[place.index - 1];
  show(lookup, before ? before.lookup.text : null, isPinned);
}

function pin(token) {
  const place = shownBy.get(token);
  const press = (at, is) => {
    for (const element of at.turn.elementsOf(at.index)) element.setAttribute("aria-pressed", String(is));
  };
  const isLetGo = isSame(pinned, place);
  if (pinned) press(pinned, false);
  pinned = isLetGo ? null : place;
  if (pinned) press(pinned, true);
  leadTo(token);
  present(place, pinned !== null);
  if (pinned) document.getElementById("details").scrollIntoView({ block: "nearest" });
}

/** The token that a key leads to, by its first piece. */
function next(token, key) {
  const tokens = [...box.querySelectorAll(".turn .token:not(.more)")];
  const { turn, index } = shownBy.get(token);
  const place = tokens.findIndex((one) => isSame(shownBy.get(one), { turn, index }));
  return tokens[{ ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: tokens.length - 1 }[key]];
}

const tokenOf = (event) => event.target.closest(".turn .token");

box.addEventListener("click", (event) => {
  const token = tokenOf(event);
  if (token && !event.target.closest("a")) pin(token);
});

box.addEventListener("focusin", (event) => {
  const token = tokenOf(event);
  if (!token) return;
  leadTo(token);
  if (pinned === null) present(shownBy.get(token), false);
});

box.addEventListener("mouseover", (event) => {
  const token = tokenOf(event);
  if (token && pinned === null) present(shownBy.get(token), false);
});

box.addEventListener("keydown", (event) => {
  const token = tokenOf(event);
  if (!token) return;
  if (event.key === "Enter" || event.key === " ") {
    pin(token);
  } else if (event.key === "Escape") {
    if (pinned) pin(token.getAttribute("aria-pressed") === "true" ? token : pinned.turn.elementsOf(pinned.index)[0]);
  } else {
    const target = next(token, event.key);
    if (!target) return;
    target.focus();
  }
  event.preventDefault();
});
