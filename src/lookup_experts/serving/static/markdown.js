// Markdown to elements. No HTML is ever parsed: what looks like it is text.
//
// Every character keeps the place where it stood in the whole text, also when the marks of a list
// or a quotation have been taken off its line, so that the caller, who makes the nodes for a run of
// characters, can tell which token each of them came with.

const DEEPEST = 8; // nesting beyond which marks stay text
const LINKS = new Set(["http:", "https:", "mailto:"]);

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?: +|$)/;
const COLUMNS = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const ADDRESS = /^https?:\/\/[^\s<>"]*[^\s<>"'.,;:!?)\]}]/;

/** A text of which each character knows its place. */
class Span {
  constructor(text, places) {
    this.text = text;
    this.places = places;
  }

  slice(begin, end = this.text.length) {
    return new Span(this.text.slice(begin, end), this.places.slice(begin, end));
  }

  static lines(spans) {
    const places = [];
    for (const [number, { places: own }] of spans.entries()) {
      if (number > 0) places.push((places.at(-1) ?? own[0] ?? 0) + (own.length ? 1 : 0));
      for (const place of own) places.push(place);
    }
    return new Span(spans.map((span) => span.text).join("\n"), places);
  }
}

function linesOf(text) {
  const places = Array.from({ length: text.length }, (_, place) => place);
  const whole = new Span(text, places);
  const lines = [];
  let begin = 0;
  for (const line of text.split("\n")) {
    lines.push(whole.slice(begin, begin + line.length));
    begin += line.length + 1;
  }
  return lines;
}

/**
 * The blocks of a text, one after the other.
 * @returns {{source: string, draw: function}[]} `draw(makeText)` gives the element; two blocks with
 *   the same `source` look the same.
 */
export function blocksOf(text) {
  return parse(linesOf(text), 0).map(({ lines, draw }) => ({
    source: lines.map((line) => line.text).join("\n"),
    draw,
  }));
}

// ------------------------------------------------------------------ blocks

const isBlank = (line) => line.text.trim() === "";
const begins = (line) =>
  FENCE.test(line.text) || HEADING.test(line.text) || RULE.test(line.text) ||
  QUOTE.test(line.text) || ITEM.test(line.text);

function parse(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [length, draw] = readBlock(lines.slice(at), depth);
    blocks.push({ lines: lines.slice(at, at + length), draw });
    at += length;
  }
  return blocks;
}

/** How many lines the first block has, and what draws it. */
function readBlock(lines, depth) {
  const first = lines[0].text;
  if (FENCE.test(first)) return readFence(lines);
  if (HEADING.test(first)) {
    const marks = first.match(HEADING);
    const title = lines[0].slice(marks[0].length, first.replace(/[ \t]+#*[ \t]*$/, "").length);
    return [1, (make) => inlineElement(`h${Math.min(6, marks[1].length + 2)}`, title, make)];
  }
  if (RULE.test(first)) return [1, () => document.createElement("hr")];
  if (depth < DEEPEST && QUOTE.test(first)) return readQuote(lines, depth);
  if (depth < DEEPEST && ITEM.test(first)) return readList(lines, depth);
  if (first.includes("|") && lines.length > 1 && isTable(lines)) return readTable(lines);
  return readParagraph(lines);
}

function readParagraph(lines) {
  let length = 1;
  while (length < lines.length && !isBlank(lines[length]) && !begins(lines[length])) length += 1;
  const text = Span.lines(lines.slice(0, length));
  return [length, (make) => inlineElement("p", text, make)];
}

function readFence(lines) {
  const [, fence, language] = lines[0].text.match(FENCE);
  const isEnd = ({ text }) => text.trim().length >= fence.length && text.trim() === fence[0].repeat(text.trim().length);
  const end = lines.findIndex((line, number) => number > 0 && isEnd(line));
  const last = end < 0 ? lines.length : end; // one that is still being written goes to the end
  const code = Span.lines(lines.slice(1, last));
  const draw = (make) => {
    const pre = document.createElement("pre");
    const inner = pre.appendChild(document.createElement("code"));
    if (language.trim()) pre.dataset.language = language.trim();
    inner.append(...make(code.text, code.places));
    return pre;
  };
  return [end < 0 ? lines.length : end + 1, draw];
}

function readQuote(lines, depth) {
  let length = 1;
  while (length < lines.length && !isBlank(lines[length]) && (QUOTE.test(lines[length].text) || !begins(lines[length]))) length += 1;
  const inner = lines.slice(0, length).map((line) => line.slice(line.text.match(QUOTE)?.[0].length ?? 0));
  return [length, (make) => container("blockquote", parse(inner, depth + 1), make)];
}

function readList(lines, depth) {
  const isOrdered = (mark) => /\d/.test(mark);
  const [, , firstMark] = lines[0].text.match(ITEM);
  const items = [];
  let at = 0;
  while (at < lines.length) {
    const mark = lines[at].text.match(ITEM);
    if (!mark || RULE.test(lines[at].text) || isOrdered(mark[2]) !== isOrdered(firstMark)) break;
    const [length, inner] = readItem(lines.slice(at), mark[0].length, mark[1].length);
    items.push(parse(inner, depth + 1));
    at += length;
    let next = at; // empty lines between items don't end the list
    while (next < lines.length && isBlank(lines[next])) next += 1;
    if (next < lines.length && ITEM.test(lines[next].text)) at = next;
  }
  const draw = (make) => {
    const list = document.createElement(isOrdered(firstMark) ? "ol" : "ul");
    if (isOrdered(firstMark)) list.start = parseInt(firstMark, 10);
    list.append(...items.map((blocks) => container("li", blocks, make)));
    return list;
  };
  return [at, draw];
}

/** An item's lines, without its mark and indentation. */
function readItem(lines, width, markIndent) {
  const indentOf = ({ text }) => text.length - text.trimStart().length;
  const inner = [lines[0].slice(width)];
  let length = 1;
  while (length < lines.length) {
    const line = lines[length];
    if (isBlank(line)) {
      const next = lines.slice(length).find((later) => !isBlank(later));
      if (!next || indentOf(next) <= markIndent + 1) break;
      inner.push(line.slice(line.text.length));
    } else if (indentOf(line) > markIndent + 1) {
      inner.push(line.slice(Math.min(indentOf(line), width)));
    } else if (begins(line) || isBlank(lines[length - 1])) {
      break;
    } else {
      inner.push(line);
    }
    length += 1;
  }
  return [length, inner];
}

function cellsOf(line) {
  const cells = [];
  let begin = /^ *\|/.exec(line.text)?.[0].length ?? 0;
  for (let at = begin; at <= line.text.length; at += 1) {
    const isEnd = at === line.text.length;
    if (!isEnd && (line.text[at] !== "|" || line.text[at - 1] === "\\")) continue;
    const cell = line.slice(begin, at);
    if (!isEnd || cell.text.trim()) {
      const lead = cell.text.length - cell.text.trimStart().length;
      cells.push(cell.slice(lead, Math.max(lead, cell.text.trimEnd().length)));
    }
    begin = at + 1;
  }
  return cells;
}

const isTable = ([head, columns]) =>
  columns.text.includes("-") && COLUMNS.test(columns.text) &&
  cellsOf(head).length === cellsOf(columns).length;

function readTable(lines) {
  let length = 2;
  while (length < lines.length && !isBlank(lines[length]) && lines[length].text.includes("|")) length += 1;
  const head = cellsOf(lines[0]);
  const body = lines.slice(2, length).map((line) => cellsOf(line).slice(0, head.length));
  const draw = (make) => {
    const table = document.createElement("table");
    const row = (cells, name) => {
      const made = document.createElement("tr");
      made.append(...cells.map((cell) => inlineElement(name, cell, make)));
      return made;
    };
    table.createTHead().append(row(head, "th"));
    table.createTBody().append(...body.map((cells) => row(cells, "td")));
    const box = document.createElement("div");
    box.className = "wide";
    box.append(table);
    return box;
  };
  return [length, draw];
}

function container(name, blocks, make) {
  const element = document.createElement(name);
  element.append(...blocks.map((block) => block.draw(make)));
  return element;
}

// ------------------------------------------------------------------ within a line

function inlineElement(name, span, make) {
  const element = document.createElement(name);
  inline(span, element, make, 0);
  return element;
}

/** Append what a run of text says; marks without a counterpart are text. */
function inline({ text, places }, parent, make, depth) {
  let plain = 0; // from here on nothing is drawn yet
  const flush = (end) => {
    if (end > plain) parent.append(...make(text.slice(plain, end), places.slice(plain, end)));
  };
  const part = (begin, end) => new Span(text.slice(begin, end), places.slice(begin, end));
  const missing = new Set(); // marks that are known not to be closed
  let at = 0;
  while (at < text.length) {
    const found = depth < DEEPEST ? mark(text, at, missing) : null;
    if (!found) {
      at += 1;
      continue;
    }
    flush(at);
    if (found.element === null) {
      parent.append(...make(text.slice(found.begin, found.end), places.slice(found.begin, found.end)));
    } else {
      const element = parent.appendChild(found.element);
      const inner = part(found.begin, found.end);
      if (found.isLiteral) element.append(...make(inner.text, inner.places));
      else inline(inner, element, make, depth + 1);
    }
    at = plain = found.next;
  }
  flush(text.length);
}

/** The mark that begins at a place: its element, what is in it, and where the text goes on. */
function mark(text, at, missing) {
  switch (text[at]) {
    case "\\":
      return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") && { element: null, begin: at + 1, end: at + 2, next: at + 2 };
    case "`":
      return code(text, at, missing);
    case "*":
    case "_":
    case "~":
      return emphasis(text, at, missing);
    case "[":
    case "!":
      return link(text, at, missing);
    case "h":
      return address(text, at, "", "");
    case "<":
      return address(text, at, "<", ">");
    default:
      return null;
  }
}

function code(text, at, missing) {
  const fence = /^`+/.exec(text.slice(at))[0];
  if (missing.has(fence)) return { element: null, begin: at, end: at + fence.length, next: at + fence.length };
  const begin = at + fence.length;
  const closing = new RegExp(`(?<!\`)${fence}(?!\`)`, "g");
  closing.lastIndex = begin;
  const end = closing.exec(text)?.index;
  if (end === undefined) {
    missing.add(fence);
    return { element: null, begin: at, end: begin, next: begin };
  }
  return { element: document.createElement("code"), begin, end, next: end + fence.length, isLiteral: true };
}

const NAMES = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };
const isWord = (character) => /[\p{L}\p{N}]/u.test(character ?? "");
const isSpace = (character) => character === undefined || /\s/.test(character);

function emphasis(text, at, missing) {
  const run = /^(\*+|_+|~+)/.exec(text.slice(at))[0];
  const marks = run.length > 2 ? run[0].repeat(2) : run;
  const begin = at + marks.length;
  const literal = { element: null, begin: at, end: at + run.length, next: at + run.length };
  if (!NAMES[marks] || missing.has(marks) || isSpace(text[at + run.length])) return literal;
  if (marks[0] === "_" && isWord(text[at - 1])) return literal;
  for (let end = text.indexOf(marks, begin); end >= 0; end = text.indexOf(marks, end + 1)) {
    const after = text[end + marks.length];
    if (end === begin || isSpace(text[end - 1]) || text[end - 1] === "\\") continue;
    if (marks.length === 1 && (after === marks || text[end - 1] === marks)) {
      end = skip(text, end, marks); // of a stronger mark
      continue;
    }
    if (marks.length === 2 && after === marks[0] && text[end + 3] !== marks[0]) continue;
    if (marks[0] === "_" && isWord(after)) continue;
    return { element: document.createElement(NAMES[marks]), begin, end, next: end + marks.length };
  }
  missing.add(marks);
  return literal;
}

function skip(text, at, character) {
  while (text[at + 1] === character) at += 1;
  return at;
}

/** `[words](address)`; of a picture its words, since none is fetched from elsewhere. */
function link(text, at, missing) {
  const open = text[at] === "!" ? at + 1 : at;
  if (text[open] !== "[" || missing.has("]")) return null;
  const middle = text.indexOf("](", open + 1);
  if (middle < 0) {
    missing.add("]");
    return null;
  }
  const end = text.indexOf(")", middle + 2);
  const inner = text.slice(open + 1, middle);
  if (end < 0 || inner.includes("[") || /\n\s*\n/.test(inner)) return null;
  const element = anchor(text.slice(middle + 2, end).split(/\s/, 1)[0]);
  return element && { element, begin: open + 1, end: middle, next: end + 1 };
}

function address(text, at, open, close) {
  if (open === "" && isWord(text[at - 1])) return null;
  const found = ADDRESS.exec(text.slice(at + open.length));
  if (!found) return null;
  const begin = at + open.length;
  const end = begin + found[0].length;
  const next = text.startsWith(close, end) ? end + close.length : -1;
  const element = next < 0 ? null : anchor(found[0]);
  return element && { element, begin, end, next, isLiteral: true };
}

/** A link that leads out, or null where the address isn't one that a text may lead to. */
function anchor(href) {
  let url;
  try {
    url = new URL(href);
  } catch {
    return null;
  }
  if (!LINKS.has(url.protocol)) return null;
  const element = document.createElement("a");
  element.href = url.href;
  element.target = "_blank";
  element.rel = "noopener noreferrer nofollow";
  return element;
}
