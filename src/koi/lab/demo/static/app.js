// The page: pads, the questions they make for the server, and what is shown of the answers.

import { Chart } from "./chart.js";
import { Pad, trace } from "./pad.js";
import { again, drawing, NAMES, STARTS } from "./shapes.js";

const LETTERS = ["A", "B", "C", "D", "E"];
const OTHER = { learned: "random", random: "learned" };
const QUIET = 700; // milliseconds without a change after which the answer is spoken
const PLAYING = 350; // milliseconds that a step is shown for

const $ = (id) => document.getElementById(id);

const limits = await ask("limits");
const MEANING = {
  learned: `The network has practised on ${limits.num_tasks.toLocaleString("en")} such puzzles, none with your shapes. One or two steps are enough.`,
  random: "The same network and the same steps, without the practice: it soon knows your examples by heart, but often takes a new drawing for something else.",
};
const page = {
  pads: [],
  query: new Pad({
    name: "the pad for the new drawing",
    limits: padLimits(),
    onchange: changed,
    onsample: sampleQuery,
  }),
  initialisation: "learned",
  step: Number($("steps").value),
  version: 0, // of what is drawn
  answers: {}, // by initialisation, each with the version that it is the answer to
  problem: "",
};
const charts = {
  losses: new Chart($("losses"), { label: "Loss on your examples", ticks: lossTicks, format: String }),
  beliefs: new Chart($("beliefs"), {
    label: "Probability of the likeliest shape",
    ticks: () => [0, 0.5, 1],
    format: (value) => `${100 * value}%`,
  }),
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
    `The network: four convolutions, meta-learned with Reptile on the handwritten characters of Omniglot. It sees drawings as the small pictures of 28 × 28 pixels beside the bars.`;
  for (const start of STARTS) {
    if (start.shapes.length <= limits.max_classes) $("starts").append(startButton(start));
  }
  $("clear-all").addEventListener("click", () => {
    for (const pad of [...page.pads, page.query]) pad.clear();
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
  for (const radio of document.getElementsByName("start")) {
    radio.addEventListener("change", () => {
      page.initialisation = radio.value;
      show();
      pump();
    });
  }
  document.documentElement.addEventListener("themechange", show);
  begin(STARTS[0]);
}

function begin({ shapes, again: number }) {
  resize(shapes.length);
  shapes.forEach((name, i) => fill(page.pads[i], name));
  page.query.set(again(drawing(shapes[number]), number + 1));
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
  const strokes = drawn.length ? drawn[attempts % drawn.length].strokes : drawing(NAMES[0]);
  attempts += 1;
  page.query.set(again(strokes, attempts));
}

function padLimits() {
  return { strokes: limits.max_strokes, points: limits.max_points };
}

// Questions. One is under way at a time; what is drawn meanwhile makes the next.

function changed() {
  page.version += 1;
  page.problem = "";
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

// The initialisation to ask about next: the chosen one, then, with the pen lifted, the other.
function wanted() {
  if (missing().length) return null;
  const old = (name) => (page.answers[name]?.version ?? -1) < page.version;
  if (old(page.initialisation)) return page.initialisation;
  const busy = [...page.pads, page.query].some((pad) => pad.isDrawing);
  return !busy && old(OTHER[page.initialisation]) ? OTHER[page.initialisation] : null;
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
  const answer = answerTo(page.initialisation);
  const other = answerTo(OTHER[page.initialisation]);
  const belief = answer?.probabilities[page.step];
  $("meaning").textContent = MEANING[page.initialisation];
  showBars(answer, belief);
  paintSeen($("query-seen"), page.query.isEmpty ? undefined : answer?.images.at(-1));
  showVerdict(belief);
  showOther(other);
  const lines = [[answer, page.initialisation], [other, OTHER[page.initialisation]]];
  charts.losses.show(
    lines.flatMap(([each, kind]) => (each ? [{ values: each.losses, kind }] : [])),
    page.step,
    limits.max_steps,
  );
  const classes = belief ? page.pads.map((_, i) => answer.probabilities.map((row) => row[i])) : [];
  charts.beliefs.show(
    classes.map((values, i) => ({ values, kind: `class-${LETTERS[i]}` })),
    page.step,
    limits.max_steps,
  );
}

// The latest answer, as long as it is to a question of the kind that is on the pads now.
function answerTo(initialisation) {
  const answer = page.answers[initialisation];
  const { examples, query } = answer?.question ?? {};
  const fits = examples?.length === page.pads.length && (query === null) === page.query.isEmpty;
  return fits && missing().length === 0 ? answer : undefined;
}

function buildBars() {
  $("bars").replaceChildren(
    ...page.pads.map((_, i) => {
      const row = document.createElement("li");
      row.className = `class-${LETTERS[i]}`;
      row.innerHTML = `<span class="letter">${LETTERS[i]}</span><canvas class="seen" width="28" height="28" aria-hidden="true"></canvas><span class="bar"><span class="fill"></span></span><span class="percent"></span>`;
      return row;
    }),
  );
}

function showBars(answer, belief) {
  [...$("bars").children].forEach((row, i) => {
    const part = belief?.[i] ?? 0;
    row.querySelector(".fill").style.width = `${100 * part}%`;
    row.querySelector(".percent").textContent = belief ? percent(part) : "";
    row.classList.toggle("best", belief !== undefined && part === Math.max(...belief));
    paintSeen(row.querySelector(".seen"), page.pads[i].isEmpty ? undefined : answer?.images[i]);
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

function showVerdict(belief) {
  const verdict = $("verdict");
  verdict.className = "verdict";
  let spoken;
  if (page.problem) {
    verdict.classList.add("problem");
    verdict.textContent = page.problem;
  } else if (missing().length) {
    verdict.textContent = `Draw an example of ${listed(missing(), "and")} first.`;
  } else if (page.query.isEmpty) {
    verdict.textContent = `Now draw ${listed(LETTERS.slice(0, page.pads.length), "or")} again, in your own way.`;
  } else if (belief) {
    const best = belief.indexOf(Math.max(...belief));
    verdict.classList.add(`class-${LETTERS[best]}`);
    verdict.innerHTML = `It says <strong>${LETTERS[best]}</strong><span>${percent(belief[best])} sure</span>`;
    spoken = `It says ${LETTERS[best]}, ${percent(belief[best])} sure.`;
  }
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    $("spoken").textContent = spoken ?? verdict.textContent;
  }, QUIET);
}

function showOther(other) {
  const belief = other?.probabilities[page.step];
  if (!belief) {
    $("other").textContent = "";
    return;
  }
  const best = belief.indexOf(Math.max(...belief));
  const from = { learned: "a random initialisation", random: "the learned initialisation" };
  $("other").textContent =
    `From ${from[page.initialisation]}, the same steps lead to ${LETTERS[best]}, ${percent(belief[best])} sure.`;
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
