// What the page keeps over a reload, for as long as its tab is open: the turns and the choices.

const NAME = "lookup-experts";

/** Keep a state; where the browser has too little room, without what the experts did. */
export function keep(state) {
  for (const detailed of [true, false]) {
    try {
      sessionStorage.setItem(NAME, JSON.stringify(detailed ? state : withoutTokens(state)));
      return;
    } catch {
      // Too large, or not allowed here: then with less, or not at all.
    }
  }
}

function withoutTokens(state) {
  return { ...state, turns: state.turns.map((turn) => ({ ...turn, tokens: [] })) };
}

/** What was kept last, or null. */
export function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(NAME));
  } catch {
    return null;
  }
}
