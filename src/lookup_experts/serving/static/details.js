// One token's details: its record, and the heat map of router weights.

const element = (id) => document.getElementById(id);
const NARROW = 8; // experts beyond which a cell is too small for its number
const KINDS_WITH_WEIGHTS = new Set(["mole-table", "mole-experts"]);

/** `73.7 kB`. */
export function formatBytes(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (bytes >= 1000 && unit < units.length - 1) {
    bytes /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? bytes : bytes.toPrecision(3)} ${units[unit]}`;
}

const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");

/** Whether a served model has lookup experts, of which there is something to show. */
export const hasLookupExperts = (stats) => KINDS_WITH_WEIGHTS.has(stats.kind);

/** An empty heat map of the served model's size; nothing where there are no lookup experts. */
export function prepare(stats) {
  element("details").hidden = !hasLookupExperts(stats);
  element("legend").hidden = stats.kind !== "mole-table" || stats.store === "memory";
  if (hasLookupExperts(stats)) build(stats.layers, stats.experts);
}

function cell(name, text, scope) {
  const made = document.createElement(name);
  made.textContent = text;
  if (scope) made.scope = scope;
  return made;
}

function build(layers, experts) {
  const table = element("heat").querySelector("table");
  table.classList.toggle("narrow", experts > NARROW);
  const names = Array.from({ length: experts }, (_, expert) => {
    const header = cell("th", experts > NARROW ? "" : `E${expert + 1}`, "col");
    header.setAttribute("aria-label", `Expert ${expert + 1}`);
    return header;
  });
  const head = document.createElement("tr");
  head.append(cell("th", "Layer", "col"), ...names);
  table.tHead.replaceChildren(head);
  const rows = Array.from({ length: layers }, (_, layer) => {
    const row = document.createElement("tr");
    row.append(cell("th", layer + 1, "row"));
    for (let expert = 0; expert < experts; expert += 1) row.append(cell("td", ""));
    return row;
  });
  table.tBodies[0].replaceChildren(...rows);
}

/** Fill the heat map; a square root keeps small weights apart. */
function paint(weights) {
  const table = element("heat").querySelector("table");
  if (table.tBodies[0].rows.length !== weights.length) build(weights.length, weights[0].length);
  const rows = table.tBodies[0].rows;
  weights.forEach((layer, place) => {
    layer.forEach((weight, expert) => {
      const target = rows[place].cells[expert + 1];
      const shade = Math.sqrt(weight);
      target.style.setProperty("--weight", shade.toFixed(3));
      target.classList.toggle("middle", shade > 0.59); // beyond, black is the better ink in the dark
      target.classList.toggle("high", shade > 0.67); // beyond, white is in the light
      target.textContent = weight.toFixed(2);
    });
  });
}

/** Show no token, as before the first. */
export function forget() {
  element("detail-token").textContent = "No token yet";
  element("detail-token").title = "";
  element("detail-token").classList.remove("code");
  element("detail-pin").textContent = "";
  for (const id of ["detail-record", "detail-bytes", "detail-time"]) element(id).textContent = "–";
  element("detail-input").textContent = "\u00a0";
  for (const target of document.querySelectorAll("#heat td")) {
    target.style.removeProperty("--weight");
    target.classList.remove("middle", "high");
    target.textContent = "";
  }
}

function recordOf(lookup) {
  if (lookup.cache_hit === null) return "In memory";
  return lookup.cache_hit ? "In the cache" : "From disk";
}

/** Show what a token's pass did. `input` is the text that went in, or null for the prompt's end. */
export function show(lookup, input, isPinned) {
  element("detail-token").textContent = visible(lookup.text);
  element("detail-token").title = `Token id ${lookup.token_id}`;
  element("detail-token").classList.add("code");
  element("detail-pin").textContent = isPinned ? `Pinned · id ${lookup.token_id}` : `id ${lookup.token_id}`;
  element("detail-record").textContent = recordOf(lookup);
  element("detail-bytes").textContent = lookup.cache_hit === null ? "–" : formatBytes(lookup.bytes_read);
  element("detail-time").textContent = `${lookup.ms.toFixed(1)} ms`;
  const from = input === null ? "the prompt’s last token" : `the token “${visible(input)}”`;
  element("detail-input").textContent = `The step that gave this token took in ${from}.`;
  if (lookup.weights !== null) paint(lookup.weights);
}
