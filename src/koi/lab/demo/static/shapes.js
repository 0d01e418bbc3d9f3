// Shapes to start from, drawn for this page: strokes in percent of the pad, from which smooth or
// straight lines are made, and a second drawing of a shape by the same unsteady hand.

const curve = (...points) => ({ points, smooth: true });
const line = (...points) => ({ points, smooth: false });
const ring = (x, y, wide, high = wide) => curve(
  ...Array.from({ length: 13 }, (_, i) => (2 * Math.PI * i) / 12 - 1.2)
    .map((angle) => [x + wide * Math.cos(angle), y + high * Math.sin(angle)]),
);

const SHAPES = {
  fish: [curve([88, 26], [70, 40], [44, 64], [22, 66], [10, 50], [22, 34], [44, 36], [70, 60], [88, 74])],
  wave: [curve([8, 58], [22, 34], [38, 58], [54, 66], [66, 42], [80, 36], [92, 60])],
  leaf: [curve([18, 84], [20, 48], [44, 22], [82, 16], [78, 54], [52, 80], [18, 84]), curve([18, 84], [44, 56], [66, 34])],
  key: [curve([46, 30], [34, 44], [18, 38], [16, 20], [32, 12], [46, 22], [46, 30]), line([42, 38], [84, 80]), line([68, 64], [80, 52]), line([78, 74], [90, 62])],
  ladder: [line([28, 10], [24, 90]), line([72, 10], [76, 90]), line([27, 34], [73, 34]), line([26, 64], [74, 64])],
  anchor: [line([50, 12], [50, 86]), curve([16, 58], [24, 78], [50, 88], [76, 78], [84, 58]), line([32, 30], [68, 30])],
  moon: [curve([64, 10], [34, 18], [20, 46], [32, 76], [66, 88], [50, 66], [46, 40], [64, 10])],
  bolt: [line([62, 8], [28, 52], [60, 50], [34, 92])],
  star: [line([50, 8], [76, 88], [10, 36], [90, 36], [24, 88], [50, 8])],
  house: [line([14, 48], [50, 12], [86, 48]), line([24, 42], [24, 88], [76, 88], [76, 42]), line([50, 88], [50, 64])],
  eye: [curve([8, 50], [28, 30], [50, 24], [72, 30], [92, 50], [72, 70], [50, 76], [28, 70], [8, 50]), curve([50, 40], [60, 50], [50, 60], [40, 50], [50, 40])],
  fork: [line([50, 10], [50, 90]), curve([20, 12], [22, 40], [50, 54], [78, 40], [80, 12])],
  heart: [curve([50, 34], [34, 14], [14, 24], [18, 50], [50, 86]), curve([50, 34], [66, 14], [86, 24], [82, 50], [50, 86])],
  snail: [curve([52, 50], [60, 46], [60, 58], [46, 62], [38, 48], [48, 34], [68, 38], [74, 60], [56, 78], [30, 74], [20, 48], [34, 20], [62, 14])],
  mushroom: [curve([12, 50], [20, 22], [50, 10], [80, 22], [88, 50], [12, 50]), line([40, 50], [38, 88], [62, 88], [60, 50])],
  umbrella: [curve([12, 50], [20, 22], [50, 10], [80, 22], [88, 50], [12, 50]), curve([50, 50], [50, 82], [40, 92], [30, 82])],
  jellyfish: [curve([12, 50], [20, 22], [50, 10], [80, 22], [88, 50], [12, 50]), curve([30, 50], [26, 66], [34, 78], [30, 92]), curve([50, 50], [46, 66], [54, 78], [50, 92]), curve([70, 50], [66, 66], [74, 78], [70, 92])],
  dinghy: [line([10, 62], [90, 62], [74, 84], [26, 84], [10, 62]), line([46, 62], [46, 14], [78, 54], [46, 54])],
  yawl: [line([10, 62], [90, 62], [74, 84], [26, 84], [10, 62]), line([54, 62], [54, 14], [22, 54], [54, 54])],
  cog: [line([10, 62], [90, 62], [74, 84], [26, 84], [10, 62]), line([50, 62], [50, 12]), line([26, 20], [74, 20], [74, 50], [26, 50], [26, 20])],
  cat: [line([20, 20], [34, 36], [66, 36], [80, 20], [82, 62], [50, 88], [18, 62], [20, 20]), line([38, 54], [38, 60]), line([62, 54], [62, 60])],
  owl: [line([20, 16], [36, 30], [64, 30], [80, 16]), curve([20, 16], [16, 60], [34, 88], [66, 88], [84, 60], [80, 16]), ring(37, 50, 10), ring(63, 50, 10)],
  dog: [curve([26, 30], [14, 44], [16, 70], [28, 60]), curve([74, 30], [86, 44], [84, 70], [72, 60]), curve([26, 30], [50, 20], [74, 30], [72, 70], [50, 90], [28, 70], [26, 30]), line([40, 50], [40, 56]), line([60, 50], [60, 56])],
  spiral: [curve([50, 50], [58, 46], [56, 60], [40, 60], [36, 42], [52, 30], [70, 40], [72, 64], [50, 80], [24, 66], [20, 38], [42, 14])],
  at: [curve([62, 40], [46, 36], [38, 52], [48, 64], [62, 58], [64, 38], [66, 62], [82, 60], [84, 36], [60, 12], [28, 18], [14, 46], [24, 78], [52, 90], [76, 82])],
  theta: [ring(50, 50, 28, 42), line([22, 50], [78, 50])],
  phi: [line([50, 6], [50, 94]), ring(50, 50, 32, 24)],
  omega: [curve([12, 88], [36, 86], [22, 62], [20, 34], [50, 12], [80, 34], [78, 62], [64, 86], [88, 88])],
  psi: [line([50, 8], [50, 92]), curve([18, 18], [22, 50], [50, 62], [78, 50], [82, 18])],
};

// What the page offers: look-alikes, each set with the shape that is drawn again, and in which attempt:
// one that the practised network takes for the right shape, and the other, after three steps or more,
// for another.
export const STARTS = [
  { name: "Hats", shapes: ["mushroom", "umbrella", "jellyfish"], again: 1, attempt: 7 },
  { name: "Boats", shapes: ["dinghy", "yawl", "cog"], again: 1, attempt: 13 },
  { name: "Animals", shapes: ["cat", "owl", "dog"], again: 1, attempt: 7 },
  { name: "Coils", shapes: ["spiral", "snail", "at"], again: 1, attempt: 15 },
  { name: "Greek", shapes: ["theta", "phi", "at", "omega", "psi"], again: 0, attempt: 7 },
];

export const NAMES = Object.keys(SHAPES);

const PIECES = 8; // straight pieces of a smooth line from one given point to the next

export function drawing(name) {
  return SHAPES[name].map(({ points, smooth }) =>
    (smooth ? smoothed(points) : subdivided(points)).map(([x, y]) => [x / 100, y / 100]),
  );
}

// The same shape as another attempt would give it: turned, leant, stretched and wobbly. The number
// of the attempt decides how, so that a visitor sees the same each time.
export function again(strokes, attempt = 1) {
  const random = numbers(attempt);
  const angle = (random() < 0.5 ? -1 : 1) * (0.08 + 0.08 * random());
  const [lean, wide, high] = [0.16 * (random() - 0.5), 0.86 + 0.2 * random(), 0.86 + 0.2 * random()];
  const phases = [random(), random(), random(), random()].map((part) => 2 * Math.PI * part);
  const wobble = (u, phase, other) =>
    0.013 * (Math.sin(4 * u + phase) + Math.sin(8 * u + other));
  const turn = ([x, y]) => {
    const [a, b] = [wide * (x - 0.5) + lean * (y - 0.5), high * (y - 0.5)];
    return [
      clamped(0.5 + a * Math.cos(angle) - b * Math.sin(angle) + wobble(x + y, phases[0], phases[1])),
      clamped(0.5 + a * Math.sin(angle) + b * Math.cos(angle) + wobble(x - y, phases[2], phases[3])),
    ];
  };
  return strokes.map((stroke) => stroke.map(turn));
}

function clamped(value) {
  return Math.min(0.98, Math.max(0.02, value));
}

// Catmull-Rom: through every point, with the direction of its neighbours.
function smoothed(points) {
  const closed = String(points[0]) === String(points.at(-1));
  const at = (i) => {
    if (closed) return points[(i + points.length - 1) % (points.length - 1)];
    return points[Math.min(points.length - 1, Math.max(0, i))];
  };
  const result = [points[0]];
  for (let i = 0; i + 1 < points.length; i++) {
    const [p, q, r, s] = [at(i - 1), at(i), at(i + 1), at(i + 2)];
    for (let k = 1; k <= PIECES; k++) {
      const t = k / PIECES;
      result.push([0, 1].map((axis) =>
        0.5 * (2 * q[axis] + (r[axis] - p[axis]) * t
          + (2 * p[axis] - 5 * q[axis] + 4 * r[axis] - s[axis]) * t * t
          + (3 * q[axis] - p[axis] - 3 * r[axis] + s[axis]) * t * t * t)));
    }
  }
  return result;
}

function subdivided(points) {
  const result = [points[0]];
  for (let i = 0; i + 1 < points.length; i++) {
    for (let k = 1; k <= PIECES; k++) {
      result.push([0, 1].map((axis) =>
        points[i][axis] + ((points[i + 1][axis] - points[i][axis]) * k) / PIECES));
    }
  }
  return result;
}

// Mulberry32, a small generator of numbers in [0, 1).
function numbers(seed) {
  let state = seed * 0x9e3779b9;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}
