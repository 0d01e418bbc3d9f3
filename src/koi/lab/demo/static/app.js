// The page: pads, the questions they make for the server, and what is shown of the answers.

import { Chart } from "./chart.js";
import { Pad, trace } from "./pad.js";
import { forget, remember, remembered } from "./memory.js";
import { again, drawing, NAMES, STARTS } from "./shapes.js";

const LETTERS = ["A", "B", "C", "D", "E"];
const NONE = "?";
const STARTED = { learned: "", random: "-random" }; // initialisations, and what ends their places' names
const QUIET = 700; // milliseconds without a change after which the answer is spoken
const PLAYING = 350; // milliseconds that a step is shown for

const $ = (id) => document.getElementById(id);

const limits = await ask("limits");
const page = {
  pads: [],
  query: new Pad({
    name: "the pad for the new drawing",
    limits: padLimits(),
    onchange: changed,
    onsample: sampleQuery,
  }),
  step: Number($("steps").value),
  version: 0, // of what is drawn
  truth: null, // which shape the page itself drew again, where it did
  resting: false, // while many pads are changed as one
  answers: {}, // by initialisation, each with the version that it is the answer to
  problem: "",
};
const charts = {
  losses: new Chart($("losses"), { label: "Mistakes on your examples", ticks: lossTicks, format: String }),
  learned: beliefChart("beliefs", "practised"),
  random: beliefChart("beliefs-random", "never practised"),
};
let asking = false;
let playing = null;
let attempts = 0;
let speaking = 0;

setUp();

function setUp() {
  $("query").append(page.query.element);
  $("steps").max = limits.max_steps;
  $("about").textContent =
    `The network: four convolutions, meta-learned with ${limits.algorithm} on the handwritten characters of Omniglot. It sees drawings as the small pictures of 28 × 28 pixels beside the letters.`;
  $("algorithm").textContent = limits.algorithm;
  $("optimizer").textContent = limits.optimizer;
  for (const start of STARTS) {
    if (start.shapes.length <= limits.max_classes) $("starts").append(startButton(start));
  }
  $("clear-all").addEventListener("click", () => {
    asOne(() => [...page.pads, page.query].forEach((pad) => pad.clear()));
    page.pads[0].canvas.focus({ focusVisible: false });
  });
  for (const id of ["more", "add"]) {
    $(id).addEventListener("click", () => resize(page.pads.length + 1));
  }
  $("fewer").addEventListener("click", () => resize(page.pads.length - 1));
  $("steps").addEventListener("input", () => {
    stop();
    showStep(Number($("steps").value));
  });
  $("play").addEventListener("click", play);
  document.addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() !== "z" || !(event.ctrlKey || event.metaKey) || event.shiftKey) return;
    event.preventDefault();
    if (![...page.pads, page.query].some((pad) => pad.isDrawing)) restore(forget());
  });
  for (const info of document.querySelectorAll(".info")) {
    info.addEventListener("keydown", (event) => {
      if (event.key === "Escape") info.open = false;
    });
  }
  document.documentElement.addEventListener("themechange", show);
  $("meaning").textContent =
    `Both networks are the same and take the same steps. One has practised on ${limits.num_tasks.toLocaleString("en")} such puzzles, none with your shapes. The other soon knows your examples by heart, too, but not what makes a new drawing one of them.`;
  const before = remembered(limits);
  if (before) restore(before);
  else begin(STARTS[0]);
}

function beliefChart(id, kind) {
  return new Chart($(id), {
    label: `Probability of the likeliest shape, ${kind}`,
    ticks: () => [0, 0.5, 1],
    format: (value) => `${100 * value}%`,
  });
}

function begin({ shapes, again: number, attempt }) {
  asOne(() => {
    resize(shapes.length);
    shapes.forEach((name, i) => fill(page.pads[i], name));
    page.query.set(again(drawing(shapes[number]), attempt));
  }, number);
}

// What is drawn, as it is kept for a reload and for Ctrl-Z.
function drawn() {
  const examples = page.pads.map(({ strokes, sampled }) => ({ strokes: rounded(strokes), sampled }));
  return { examples, query: rounded(page.query.strokes), truth: page.truth };
}

function restore(state) {
  if (!state) return;
  asOne(() => {
    resize(state.examples.length);
    state.examples.forEach(({ strokes, sampled }, i) => {
      page.pads[i].sampled = sampled;
      page.pads[i].set(strokes);
    });
    page.query.set(state.query);
  }, state.truth ?? null);
}

function asOne(change, truth = null) {
  page.resting = true;
  change();
  page.resting = false;
  changed(truth);
}

function resize(count) {
  while (page.pads.length < count) {
    const letter = LETTERS[page.pads.length];
    const pad = new Pad({
      name: `the pad of shape ${letter}`,
      letter,
      limits: padLimits(),
      onchange: changed,
      onsample: () => sample(pad),
    });
    page.pads.push(pad);
    $("add").before(pad.element);
  }
  while (page.pads.length > count) page.pads.pop().element.remove();
  $("count").textContent = count;
  $("more").disabled = $("add").hidden = count >= limits.max_classes;
  $("fewer").disabled = count <= limits.min_classes;
  buildBars();
  changed();
}

// A shape that is on no other pad, each time the next one.
function sample(pad) {
  const taken = page.pads.filter((other) => other !== pad).map((other) => other.sampled);
  const free = NAMES.filter((name) => !taken.includes(name));
  fill(pad, free[(free.indexOf(pad.sampled) + 1) % free.length]);
}

function fill(pad, name) {
  pad.sampled = name;
  pad.set(drawing(name));
}

// Another attempt at one of the examples, each time at the next one.
function sampleQuery() {
  const drawn = page.pads.filter((pad) => !pad.isEmpty);
  const chosen = drawn.length ? drawn[attempts % drawn.length] : undefined;
  attempts += 1;
  asOne(
    () => page.query.set(again(chosen?.strokes ?? drawing(NAMES[0]), attempts)),
    chosen ? page.pads.indexOf(chosen) : null,
  );
}

function padLimits() {
  return { strokes: limits.max_strokes, points: limits.max_points };
}

// Questions. One is under way at a time; what is drawn meanwhile makes the next.

function changed(truth = null) {
  if (page.resting) return;
  page.version += 1;
  page.truth = truth;
  page.problem = "";
  if (![...page.pads, page.query].some((pad) => pad.isDrawing)) remember(drawn());
  show();
  pump();
}

async function pump() {
  if (asking) return;
  asking = true;
  for (let initialisation = wanted(); initialisation; initialisation = wanted()) {
    const { version } = page;
    const question = {
      examples: page.pads.map((pad) => rounded(pad.strokes)),
      query: page.query.isEmpty ? null : rounded(page.query.strokes),
      num_steps: limits.max_steps,
      initialisation,
    };
    try {
      page.answers[initialisation] = { version, question, ...(await ask("answer", question)) };
      page.problem = "";
    } catch (error) {
      page.problem = error.message;
      if (version === page.version) page.answers = {};
    }
    show();
    if (page.problem && version === page.version) break;
  }
  asking = false;
}

// The initialisation to ask about next: the learned one, then, with the pen lifted, the random one.
function wanted() {
  if (missing().length) return null;
  const old = (name) => (page.answers[name]?.version ?? -1) < page.version;
  if (old("learned")) return "learned";
  const busy = [...page.pads, page.query].some((pad) => pad.isDrawing);
  return !busy && old("random") ? "random" : null;
}

function missing() {
  return page.pads.flatMap((pad, i) => (pad.isEmpty ? [LETTERS[i]] : []));
}

async function ask(address, question) {
  const options = question && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(question),
  };
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new Error("There is no answer from this computer: is koi demo still running?");
  }
  const content = await response.json();
  if (!response.ok) throw new Error(`That did not work: ${content.error}.`);
  return content;
}

function rounded(strokes) {
  return strokes.map((stroke) => stroke.map((point) => point.map((at) => Math.round(1e4 * at) / 1e4)));
}

// What is shown

function show() {
  const answers = Object.fromEntries(Object.keys(STARTED).map((name) => [name, answerTo(name)]));
  charts.losses.show(
    Object.entries(answers).flatMap(([kind, each]) => (each ? [{ values: each.losses, kind }] : [])),
    page.step,
    limits.max_steps,
  );
  const seen = answers.learned?.images;
  page.pads.forEach((pad, i) => paintSeen(pad.seen, pad.isEmpty ? undefined : seen?.[i]));
  paintSeen($("query-seen"), page.query.isEmpty ? undefined : seen?.at(-1));
  for (const [name, answer] of Object.entries(answers)) {
    const rows = answer?.probabilities.map((row, step) => withNone(row, answer.known[step]));
    showBars(name, rows?.[page.step], answer?.known.length !== 0);
    showVerdict(name, rows?.[page.step]);
    const kinds = rows?.length ? [...page.pads.map((_, i) => `class-${LETTERS[i]}`), "class-none"] : [];
    charts[name].show(
      kinds.map((kind, i) => ({ values: rows.map((row) => row[i]), kind })),
      page.step,
      limits.max_steps,
    );
  }
  showHint();
  clearTimeout(speaking);
  speaking = setTimeout(speak, QUIET);
}

// Of each shape, and then of none of them; of the latter 0 where the network is not calibrated.
function withNone(row, known = 1) {
  return [...row.map((part) => known * part), 1 - known];
}

// The latest answer, as long as it is to a question of the kind that is on the pads now.
function answerTo(initialisation) {
  const answer = page.answers[initialisation];
  const { examples, query } = answer?.question ?? {};
  const fits = examples?.length === page.pads.length && (query === null) === page.query.isEmpty;
  return fits && missing().length === 0 ? answer : undefined;
}

function buildBars() {
  for (const end of Object.values(STARTED)) {
    const letters = [...LETTERS.slice(0, page.pads.length), NONE];
    const rows = letters.map((letter) => {
      const row = document.createElement("li");
      row.className = letter === NONE ? "class-none" : `class-${letter}`;
      row.innerHTML = `<span class="letter">${letter}</span><span class="bar"><span class="fill"></span></span><span class="percent"></span>`;
      if (letter === NONE) row.title = "None of these";
      return row;
    });
    $(`bars${end}`).replaceChildren(...rows);
  }
}

function showBars(name, belief, calibrated) {
  const rows = [...$(`bars${STARTED[name]}`).children];
  rows.at(-1).hidden = $("none").hidden = !calibrated;
  rows.forEach((row, i) => {
    const part = belief?.[i] ?? 0;
    row.querySelector(".fill").style.width = `${100 * part}%`;
    row.querySelector(".percent").textContent = belief ? percent(part) : "";
    row.classList.toggle("best", belief !== undefined && part === Math.max(...belief));
  });
}

// What the network sees: 28 × 28 pixels.
function paintSeen(canvas, pixels) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, 28, 28);
  context.fillStyle = getComputedStyle(canvas).color;
  [...(pixels ?? "")].forEach((ink, at) => {
    if (ink === "1") context.fillRect(at % 28, Math.floor(at / 28), 1, 1);
  });
}

// Sure is more than one half; the rest is said to be not sure, with what it may be. Of a drawing that
// the page made it is known whether its best guess is right.
function judged(belief) {
  const best = belief.indexOf(Math.max(...belief.slice(0, -1)));
  const [letter, none] = [LETTERS[best], belief.at(-1)];
  const mark = page.truth === null ? "" : best === page.truth ? "right" : `wrong, it is ${LETTERS[page.truth]}`;
  if (belief[best] > 0.5) return { letter, words: `It says ${letter}`, more: `${percent(belief[best])} sure`, mark };
  const likely = none > belief[best] ? `perhaps none of these, at best ${letter}` : `perhaps ${letter}`;
  return { letter: null, words: "Not sure", more: likely, mark };
}

function showVerdict(name, belief) {
  const verdict = $(`verdict${STARTED[name]}`);
  verdict.className = "verdict";
  verdict.replaceChildren();
  if (!belief || page.problem) return;
  const { letter, words, more, mark } = judged(belief);
  verdict.classList.add(letter ? `class-${letter}` : "unsure");
  verdict.innerHTML = letter ? `It says <strong>${letter}</strong>` : `<strong>${words}</strong>`;
  verdict.insertAdjacentHTML("beforeend", `<span>${more}</span>`);
  if (!mark) return;
  const right = mark === "right";
  verdict.insertAdjacentHTML("beforeend", `<em class="${right ? "right" : "wrong"}">${right ? "✓" : "✗"} ${mark}</em>`);
}

function showHint() {
  const hint = $("hint");
  hint.classList.toggle("problem", page.problem !== "");
  if (page.problem) hint.textContent = page.problem;
  else if (missing().length) hint.textContent = `Draw an example of ${listed(missing(), "and")} first.`;
  else if (page.query.isEmpty) {
    hint.textContent = `Now draw ${listed(LETTERS.slice(0, page.pads.length), "or")} again, in your own way. Or something else.`;
  } else hint.textContent = "The small picture is what the network sees.";
}

// For people who hear the page.
function speak() {
  const said = Object.keys(STARTED).flatMap((name) => {
    const answer = page.problem ? undefined : answerTo(name);
    const row = answer?.probabilities[page.step];
    if (!row) return [];
    const { words, more, mark } = judged(withNone(row, answer.known[page.step]));
    return [`${name === "learned" ? "Practised" : "Never practised"}: ${[words, more, mark].filter(Boolean).join(", ")}.`];
  });
  $("spoken").textContent = said.join(" ") || $("hint").textContent;
}

function showStep(step) {
  page.step = step;
  $("steps").value = step;
  $("steps-shown").textContent = step;
  show();
}

function play() {
  const last = Number($("steps").value) || limits.max_steps;
  stop();
  showStep(0);
  playing = setInterval(() => {
    if (page.step >= last) stop();
    else showStep(page.step + 1);
  }, PLAYING);
}

function stop() {
  clearInterval(playing);
}

function startButton(start) {
  const button = document.createElement("button");
  Object.assign(button, { type: "button", className: "chip" });
  const size = 22;
  for (const name of start.shapes) {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 2 * size;
    canvas.className = "mini";
    canvas.setAttribute("aria-hidden", "true");
    const paint = () => {
      const context = canvas.getContext("2d");
      context.clearRect(0, 0, 2 * size, 2 * size);
      Object.assign(context, { lineWidth: 3, lineCap: "round", lineJoin: "round", strokeStyle: getComputedStyle(button).color });
      for (const stroke of drawing(name)) trace(context, stroke, 2 * size);
    };
    document.documentElement.addEventListener("themechange", paint);
    requestAnimationFrame(paint);
    button.append(canvas);
  }
  button.append(start.name);
  button.addEventListener("click", () => begin(start));
  return button;
}

function percent(part) {
  if (part > 0.99 && part < 1) return ">99%";
  return part > 0 && part < 0.01 ? "<1%" : `${Math.round(100 * part)}%`;
}

function listed(words, last) {
  if (words.length === 1) return words[0];
  return `${words.slice(0, -1).join(", ")} ${last} ${words.at(-1)}`;
}

function lossTicks(largest) {
  if (largest === 0) return [0, 1, 2];
  const step = [0.5, 1, 2, 5, 10].find((size) => 3 * size >= largest) ?? Math.ceil(largest / 3);
  const count = Math.max(1, Math.ceil(largest / step));
  return Array.from({ length: count + 1 }, (_, i) => i * step);
}
