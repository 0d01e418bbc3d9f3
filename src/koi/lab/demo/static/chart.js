// A small chart over learning steps, drawn anew whenever it is shown something or changes width.

const HEIGHT = 150;
const EDGE = { left: 42, right: 12, top: 10, bottom: 24 };

export class Chart {
  /**
   * @param {HTMLElement} parent
   * @param {object} options label, for people who hear the page; ticks, called with the largest
   *   value, gives the marks of the vertical axis, the last of which is its end; format of one.
   */
  constructor(parent, { label, ticks, format }) {
    Object.assign(this, { parent, label, ticks, format, series: [], step: 0, numSteps: 1 });
    new ResizeObserver(() => this.#draw()).observe(parent);
  }

  /**
   * @param {{values: number[], kind: string}[]} series kind is a class of the style sheet; the first
   *   is the one that matters
   * @param {number} step the one that is marked
   */
  show(series, step, numSteps) {
    Object.assign(this, { series, step, numSteps });
    this.#draw();
  }

  #draw() {
    const width = this.parent.clientWidth;
    if (width === 0) return;
    const marks = this.ticks(Math.max(0, ...this.series.flatMap(({ values }) => values)));
    const x = (step) => EDGE.left + ((width - EDGE.left - EDGE.right) * step) / this.numSteps;
    const y = (value) => HEIGHT - EDGE.bottom - ((HEIGHT - EDGE.top - EDGE.bottom) * value) / marks.at(-1);
    const svg = node("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": this.#words() });
    for (const mark of marks) {
      svg.append(node("line", { class: "grid", x1: x(0), x2: x(this.numSteps), y1: y(mark), y2: y(mark) }));
      svg.append(node("text", { class: "tick end", x: EDGE.left - 6, y: y(mark) + 4 }, this.format(mark)));
    }
    for (let step = 0; step <= this.numSteps; step += 2) {
      svg.append(node("text", { class: "tick middle", x: x(step), y: HEIGHT - 6 }, step));
    }
    svg.append(node("line", { class: "now", x1: x(this.step), x2: x(this.step), y1: EDGE.top, y2: y(0) }));
    const fromBehind = [...this.series].reverse();
    for (const { values, kind } of fromBehind) {
      const points = values.map((value, step) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`);
      svg.append(node("polyline", { class: `curve ${kind}`, points: points.join(" ") }));
    }
    for (const { values, kind } of fromBehind) {
      const value = values[this.step];
      if (value !== undefined) {
        svg.append(node("circle", { class: `dot ${kind}`, cx: x(this.step), cy: y(value), r: 4 }));
      }
    }
    this.parent.replaceChildren(svg);
  }

  #words() {
    const first = this.series[0]?.values;
    if (!first) return `${this.label}: nothing yet`;
    const [from, to] = [first[0], first[this.step]].map((value) => value.toFixed(2));
    return `${this.label}: from ${from} before the first step to ${to} after step ${this.step}`;
  }
}

function node(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
