// A pad to draw on, by mouse, pen, touch or keyboard.

const SPACING = 0.008; // points nearer than this, in parts of the pad, say nothing new
const PEN = 0.045; // its width on the screen, in parts of the pad
const STRIDE = 0.04;
const SMALL_STRIDE = 0.01;
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Pad {
  /**
   * @param {object} options name, for people who hear the page; letter, or null for the new shape;
   *   limits, of strokes and points; onchange, called after every change;
   *   onsample, called for a shape that the page draws.
   */
  constructor({ name, letter, limits, onchange, onsample }) {
    this.name = name;
    this.limits = limits;
    this.onchange = onchange;
    this.strokes = [];
    this.pointer = null; // the pointer that is drawing
    this.cursor = [0.5, 0.5]; // the keyboard's pen
    this.penDown = false;
    this.element = this.#build(letter, onsample);
    new ResizeObserver(() => this.paint()).observe(this.canvas);
    document.documentElement.addEventListener("themechange", () => this.paint());
  }

  get isEmpty() {
    return this.strokes.length === 0;
  }

  get isDrawing() {
    return this.pointer !== null || this.penDown;
  }

  set(strokes) {
    this.strokes = strokes;
    this.pointer = null;
    this.penDown = false;
    this.#changed();
  }

  clear() {
    this.set([]);
  }

  undo() {
    this.set(this.strokes.slice(0, -1));
  }

  paint() {
    const { canvas } = this;
    const size = Math.round(canvas.clientWidth * devicePixelRatio);
    if (size === 0) return;
    if (canvas.width !== size) canvas.width = canvas.height = size;
    const context = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    context.clearRect(0, 0, size, size);
    context.strokeStyle = context.fillStyle = style.color;
    context.lineWidth = PEN * size;
    context.lineCap = context.lineJoin = "round";
    for (const stroke of this.strokes) trace(context, stroke, size);
    if (document.activeElement === canvas && canvas.matches(":focus-visible")) {
      this.#paintCursor(context, size, style);
    }
  }

  #build(letter, onsample) {
    const element = document.createElement("div");
    element.className = letter ? `pad class-${letter}` : "pad new";
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-roledescription", "drawing pad");
    this.canvas.setAttribute("aria-describedby", "keys");
    const head = document.createElement("div");
    head.className = "pad-head";
    const label = document.createElement("span");
    label.className = "letter";
    label.textContent = letter ?? "new";
    label.setAttribute("aria-hidden", "true");
    this.seen = document.createElement("canvas"); // what the network sees
    Object.assign(this.seen, { className: "seen", width: 28, height: 28, title: "What the network sees" });
    this.seen.setAttribute("aria-hidden", "true");
    head.append(
      ...(letter ? [label, this.seen] : [label]),
      button("sample", `Draw something on ${this.name} for me`, onsample),
      button("undo", `Take back the last stroke on ${this.name}`, () => this.undo()),
      button("clear", `Clear ${this.name}`, () => this.clear()),
    );
    element.append(head, this.canvas);
    this.#listen();
    this.#describe();
    return element;
  }

  #listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || this.pointer !== null || !this.#hasRoom()) return;
      event.preventDefault();
      canvas.focus({ preventScroll: true, focusVisible: false });
      canvas.setPointerCapture(event.pointerId);
      this.pointer = event.pointerId;
      this.penDown = false;
      this.strokes.push([this.#place(event)]);
      this.#changed();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerId !== this.pointer) return;
      const parts = event.getCoalescedEvents?.() ?? [];
      for (const part of parts.length ? parts : [event]) this.#extend(this.#place(part));
      this.#changed();
    });
    const lift = (event) => {
      if (event.pointerId !== this.pointer) return;
      this.pointer = null;
      this.#changed();
    };
    canvas.addEventListener("pointerup", lift);
    canvas.addEventListener("pointercancel", lift);
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("focus", () => this.paint());
    canvas.addEventListener("blur", () => {
      if (!this.penDown) return this.paint();
      this.penDown = false;
      this.#changed();
    });
  }

  #key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const move = MOVES[event.key];
    if (move) {
      const stride = event.shiftKey ? SMALL_STRIDE : STRIDE;
      this.cursor = this.cursor.map((at, axis) => clamped(at + stride * move[axis]));
      if (this.penDown) this.#extend(this.cursor);
    } else if (event.key === " ") {
      this.penDown = !this.penDown && this.#hasRoom();
      if (this.penDown) this.strokes.push([this.cursor]);
    } else if (event.key === "Backspace") {
      this.undo();
    } else if (event.key === "Delete") {
      this.clear();
    } else {
      return;
    }
    event.preventDefault();
    this.#changed();
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      clamped((event.clientX - box.left) / box.width),
      clamped((event.clientY - box.top) / box.height),
    ];
  }

  #extend(point) {
    const stroke = this.strokes.at(-1);
    const [x, y] = stroke.at(-1);
    if (Math.hypot(point[0] - x, point[1] - y) >= SPACING && this.#hasRoom(0)) stroke.push(point);
  }

  #hasRoom(strokes = 1) {
    const points = this.strokes.reduce((sum, stroke) => sum + stroke.length, 0);
    return this.strokes.length + strokes <= this.limits.strokes && points < this.limits.points;
  }

  #changed() {
    this.paint();
    this.#describe();
    this.onchange();
  }

  #describe() {
    const count = this.strokes.length;
    const holds = count === 0 ? "empty" : count === 1 ? "one stroke" : `${count} strokes`;
    this.canvas.setAttribute("aria-label", `${this.name}, ${holds}${this.penDown ? ", pen down" : ""}`);
    this.element?.classList.toggle("empty", count === 0);
  }

  #paintCursor(context, size, style) {
    const [x, y] = this.cursor.map((part) => part * size);
    const radius = 0.03 * size;
    context.lineWidth = Math.max(1, 0.012 * size);
    context.strokeStyle = context.fillStyle = style.getPropertyValue("--accent");
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    if (this.penDown) context.fill();
    context.stroke();
  }
}

export function trace(context, stroke, size) {
  context.beginPath();
  stroke.forEach(([x, y], i) => context[i ? "lineTo" : "moveTo"](x * size, y * size));
  if (stroke.length === 1) context.lineTo(stroke[0][0] * size, stroke[0][1] * size);
  context.stroke();
}

function button(icon, label, onclick) {
  const element = document.createElement("button");
  Object.assign(element, { type: "button", className: "tool", title: label });
  element.setAttribute("aria-label", label);
  element.innerHTML = `<svg class="icon" aria-hidden="true"><use href="#i-${icon}"/></svg>`;
  element.addEventListener("click", onclick);
  return element;
}

function clamped(value) {
  return Math.min(1, Math.max(0, value));
}
