// What is drawn, kept for Ctrl-Z, and for a reload in the browser's own storage.

const KEY = "koi-drawings";
const MOST = 100;
const past = []; // as JSON, the last one as it is now

export function remember(state) {
  const text = JSON.stringify(state);
  if (text === past.at(-1)) return;
  past.push(text);
  if (past.length > MOST) past.shift();
  store(text);
}

// The state before the last change; undefined where there is none.
export function forget() {
  if (past.length < 2) return undefined;
  past.pop();
  store(past.at(-1));
  return JSON.parse(past.at(-1));
}

// The state that an earlier visit left, if it is whole and of what the page may ask.
export function remembered(limits) {
  try {
    const state = JSON.parse(localStorage.getItem(KEY));
    const count = state.examples.length;
    if (count < limits.min_classes || count > limits.max_classes) return undefined;
    const drawings = [state.query, ...state.examples.map(({ strokes }) => strokes)];
    if (!drawings.every((strokes) => isDrawing(strokes, limits))) return undefined;
    const known = Number.isInteger(state.truth) && state.truth >= 0 && state.truth < count;
    return { ...state, truth: known ? state.truth : null };
  } catch {
    return undefined; // nothing, or no storage
  }
}

function isDrawing(strokes, { max_strokes, max_points }) {
  const part = (at) => typeof at === "number" && at >= 0 && at <= 1;
  const isPoint = (point) => Array.isArray(point) && point.length === 2 && point.every(part);
  const isStroke = (stroke) => Array.isArray(stroke) && stroke.length > 0 && stroke.every(isPoint);
  const few = strokes.length <= max_strokes && strokes.flat().length <= max_points;
  return Array.isArray(strokes) && few && strokes.every(isStroke);
}

function store(text) {
  try {
    localStorage.setItem(KEY, text);
  } catch {
    // Without storage the drawings last as long as the page.
  }
}
